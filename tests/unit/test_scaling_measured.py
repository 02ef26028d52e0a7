"""Signals made of readings: rates, speeds, and who is there."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pipeline.said import SaidOfEngine, SaidOfWork, WorkerSaid
from pipeline.scaling.measured import Fleet, Known, signals_of
from pipeline.scaling.reading import Reading, StageReading
from pipeline.scaling.signals import PoolSignals

ITL_S = 0.05
ENGINE = SaidOfEngine(num_blocks=1000, block_size=16, max_num_seqs=32)


def worker(**work: Any) -> WorkerSaid:
    return WorkerSaid(engine=ENGINE, stats=SaidOfWork(**work))


def reading(
    time_ms: int, counters: dict[str, int] | None = None, *, prefill: dict[str, WorkerSaid] | None = None,
    decode: dict[str, WorkerSaid] | None = None, oldest_ms: dict[str, int] | None = None,
) -> Reading:  # fmt: skip
    stages = {
        "prefill": StageReading(oldest_ms or {}, prefill or {}),
        "decode": StageReading({}, decode or {}),
    }
    return Reading(time_ms, counters or {}, stages)


def seen(*readings: Reading, fleet: Fleet | None = None) -> PoolSignals:
    """What the last one says behind the others."""
    known, signals = Known(), PoolSignals()
    for one in readings:
        signals, known = signals_of(one, known, fleet or Fleet(), itl_s=ITL_S)
    return signals


def test_rates_lie_between_two_readings():
    came = [{"arrived:prefill:default": count, "arrived_tokens:prefill:default": 100 * count} for count in (4, 10)]
    assert seen(reading(1000, came[0])).prefill.lanes["default"].arrivals_per_s is None
    lane = seen(reading(1000, came[0]), reading(3000, came[1])).prefill.lanes["default"]
    assert (lane.arrivals_per_s, lane.prompt_tokens_per_s) == (3.0, 300.0)
    assert seen(reading(1000, came[1]), reading(3000, came[0])).prefill.lanes["default"].arrivals_per_s is None


def test_what_was_admitted_for_later_does_not_wait_yet():
    counters = {"waiting:prefill:default": 5, "tokens:prefill:default": 500}
    later = {"later:prefill:default": 4, "later_tokens:prefill:default": 490}
    lane = seen(reading(1000, counters | later)).prefill.lanes["default"]
    assert (lane.waiting, lane.prompt_tokens) == (1, 10)


def test_what_waits_is_never_younger_than_now():
    signals = seen(reading(1000, oldest_ms={"default": 1500, "high": 400}))
    assert (signals.prefill.lanes["default"].oldest_s, signals.prefill.lanes["high"].oldest_s) == (0.0, 0.6)


def test_a_prompt_token_costs_the_time_in_steps_whatever_lies_between_them():
    before = worker(steps=10, busy_s=1.0, prompt_tokens_computed=1000, prefix_hit_tokens=200, step_ms=900.0)
    after = worker(steps=12, busy_s=2.5, prompt_tokens_computed=2000, prefix_hit_tokens=700, step_ms=900.0)
    signals = seen(reading(1000, prefill={"p": before}), reading(61_000, prefill={"p": after}))
    first_s, second_s = 1.0 / 1200, 1.5 / 1500  # of what the cache had, too: it comes as any other
    assert signals.speeds.prompt_token_s == pytest.approx(first_s + 0.2 * (second_s - first_s))


def test_an_idle_worker_says_nothing_of_speeds():
    slow = worker(running=30, steps=10, step_ms=80.0, blocks_used=300)
    busy = reading(1000, decode={"d": slow})
    assert seen(busy).speeds.inter_token_s == pytest.approx(0.08)
    quick = msgspec.structs.replace(slow, stats=msgspec.structs.replace(slow.stats, step_ms=1.0))
    assert seen(busy, reading(2000, decode={"d": quick})).speeds.inter_token_s == pytest.approx(0.08)  # no step since


def test_the_promise_that_was_seen_broken_is_remembered_until_it_is_seen_held():
    def at(time_ms: int, running: int, step_ms: float) -> Reading:
        return reading(time_ms, decode={"d": worker(running=running, steps=time_ms, step_ms=step_ms, blocks_used=1)})

    assert seen(at(1000, 4, 20)).speeds.sequences_per_worker == 32  # its slots: nothing was ever too slow
    broken = at(2000, 30, 100)
    assert seen(broken).speeds.sequences_per_worker == pytest.approx(15)
    idle = reading(3000, decode={"d": worker(steps=2000)})
    assert seen(broken, idle).speeds.sequences_per_worker == pytest.approx(15)
    few = [at(3000 + look, 2, 20) for look in range(20)]
    assert seen(broken, *few).speeds.sequences_per_worker == pytest.approx(15)  # 2 that are quick do not tell of 15
    many = [at(3000 + look, 16, 30) for look in range(20)]
    assert seen(broken, *many).speeds.sequences_per_worker == pytest.approx(16 * 50 / 30, rel=0.1)


def test_blocks_bound_the_sequences_and_no_longer_where_answers_are_short():
    def at(time_ms: int, blocks_used: int) -> Reading:
        said = worker(running=10, steps=time_ms, step_ms=10.0, blocks_used=blocks_used)
        return reading(time_ms, decode={"d": said})

    assert seen(at(1000, 850)).speeds.sequences_per_worker == pytest.approx(10)
    assert seen(at(1000, 850), *(at(2000 + look, 50) for look in range(40))).speeds.sequences_per_worker == 32


def test_answers_of_other_stages_are_none():
    counters = {"ended:done": 100, "answers": 2, "answer_tokens": 300}
    assert seen(reading(1000, counters)).speeds.answer_tokens == 150


def test_who_leaves_is_no_capacity_whether_it_says_so_or_was_told_to():
    said = {
        "works": worker(), "paused": WorkerSaid(paused=True), "leaves": WorkerSaid(leaving=True), "told": worker(),
    }  # fmt: skip
    fleet = Fleet(starting={"decode": 2}, draining={"decode": ["told", "has gone"]}, start_s={"decode": 3.0})
    decode = seen(reading(1000, decode=said), fleet=fleet).decode
    assert (decode.alive, decode.starting, decode.draining, decode.start_s) == (1, 2, 2, 3.0)
