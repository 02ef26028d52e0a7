"""Signals made of readings: rates, speeds, and who is there."""

from __future__ import annotations

from typing import Any

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


class Decode:
    """A pool of one decode worker, looked at each second. `looks`: how many sequences it runs, and the seconds that each step takes."""

    def __init__(self) -> None:
        self.known, self.time_ms, self.steps, self.busy_s = Known(), 0, 100, 5.0
        self.look(reading(0, decode={"d": self._said(1, 0)}))

    def _said(self, running: int, blocks_used: int) -> WorkerSaid:
        return worker(running=running, steps=self.steps, busy_s=self.busy_s, blocks_used=blocks_used)

    def look(self, now: Reading) -> PoolSignals:
        signals, self.known = signals_of(now, self.known, Fleet(), itl_s=ITL_S)
        return signals

    def looks(
        self, running: int, step_s: float, count: int = 1, *, steps: int = 10, blocks_used: int = 0
    ) -> PoolSignals:
        signals = PoolSignals()
        for _ in range(count):
            self.time_ms, self.steps, self.busy_s = (
                self.time_ms + 1000,
                self.steps + steps,
                self.busy_s + steps * step_s,
            )
            signals = self.look(reading(self.time_ms, decode={"d": self._said(running, blocks_used)}))
        return signals


def test_an_idle_worker_says_nothing_of_speeds():
    pool = Decode()
    assert pool.looks(30, 0.08).speeds.inter_token_s == pytest.approx(0.08)
    assert pool.looks(30, 0.01, steps=0).speeds.inter_token_s == pytest.approx(0.08)
    assert pool.looks(0, 0.01).speeds.inter_token_s == pytest.approx(0.08)


def test_a_step_that_compiles_is_no_speed():
    pool = Decode()
    pool.looks(24, 0.02, 3)
    signals = pool.looks(24, 4.0, steps=1)
    assert (signals.speeds.inter_token_s, signals.speeds.sequences_per_worker) == (pytest.approx(0.02), 32)
    new = {"d": pool._said(1, 0), "new": worker(running=1, steps=1, busy_s=9.0)}  # its first one
    assert pool.look(reading(pool.time_ms + 1000, decode=new)).speeds.inter_token_s == pytest.approx(0.02)


def test_the_promise_that_was_seen_broken_is_remembered_until_it_is_seen_held():
    pool = Decode()
    assert pool.looks(4, 0.02, 5).speeds.sequences_per_worker == 32  # its slots: nothing was ever too slow
    assert pool.looks(30, 0.1, 3).speeds.sequences_per_worker == pytest.approx(15)
    assert pool.looks(0, 0.1, 20, steps=0).speeds.sequences_per_worker == pytest.approx(15)
    assert pool.looks(2, 0.02, 20).speeds.sequences_per_worker == pytest.approx(
        15
    )  # 2 that are quick do not tell of 15
    assert pool.looks(16, 0.03, 20).speeds.sequences_per_worker == pytest.approx(16 * 50 / 30)


def test_blocks_bound_the_sequences_and_no_longer_where_answers_are_short():
    pool = Decode()
    assert pool.looks(10, 0.01, blocks_used=850).speeds.sequences_per_worker == pytest.approx(10)
    assert pool.looks(10, 0.01, 40, blocks_used=50).speeds.sequences_per_worker == 32


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
