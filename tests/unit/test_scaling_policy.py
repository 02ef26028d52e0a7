"""`decide`: when there are more workers, when fewer, when nothing changes, and what is said of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from pipeline.config import AutoscaleSettings, StageScaling
from pipeline.errors import ConfigError
from pipeline.scaling.memory import Memory, StageMemory
from pipeline.scaling.policy import Decision, check, decide
from pipeline.scaling.signals import PoolSignals, Speeds
from tests.scaling.pools import NOW_MS, at, lane, pool, stage

WIDE = StageScaling(min_workers=0, max_workers=100)
POLICY = AutoscaleSettings(poll_s=5.0, prefill=WIDE, decode=WIDE)


class Looks:
    """Decisions one after the other; `had` workers of each stage at first."""

    def __init__(self, policy: AutoscaleSettings = POLICY, had: tuple[int, int] = (1, 1), now_ms: int = NOW_MS) -> None:
        self.policy, self.now_ms = policy, now_ms
        self.memory = Memory(prefill=StageMemory(had[0]), decode=StageMemory(had[1]))

    def look(self, signals: PoolSignals, seconds: float = 5.0) -> Decision:
        self.now_ms += round(seconds * 1000)
        decision = decide(at(signals, self.now_ms), self.policy, self.memory, self.now_ms)
        self.memory = decision.memory
        return decision

    def looks(self, signals: PoolSignals, count: int, seconds: float = 5.0) -> list[tuple[int, int]]:
        decisions = [self.look(signals, seconds) for _ in range(count)]
        return [(decision.prefill.desired, decision.decode.desired) for decision in decisions]


def busy(rate: float = 0.5, alive: tuple[int, int] = (1, 1), **prefill: Any) -> PoolSignals:
    """A pool with traffic and nothing that waits."""
    running = round(rate * 12.5)
    return pool(stage(lane(rate=rate), alive=alive[0], running=1, **prefill), stage(alive=alive[1], running=running))


def flooded(alive: int = 1, **values: Any) -> PoolSignals:
    said = stage(lane(100, 80_000, 3.1, rate=0.5), alive=alive, running=1, **values)
    return pool(said, stage(running=10))


# -- up


def test_more_are_asked_for_after_looks_in_a_row_and_the_reason_is_told():
    looks = Looks()
    looks.look(busy())
    first, second = looks.look(flooded()), looks.look(flooded())
    assert first.prefill.desired == 1
    assert second.prefill.desired > 1
    assert second.lines()[0].startswith(
        f"prefill 1 -> {second.prefill.desired}: 80,000 prompt tokens wait 40.0 s, promised 2.0 s"
    )


def test_a_single_look_is_no_reason():
    looks = Looks()
    assert looks.looks(busy(), 1) == [(1, 1)]
    assert [looks.look(signals).prefill.desired for signals in (flooded(), busy(), flooded(), busy())] == [1, 1, 1, 1]


def test_what_comes_decides_before_anything_waits():
    looks = Looks()
    prefill, decode = looks.looks(busy(8.0), 2)[-1]  # 3.2 prompts and 100 sequences at once
    assert prefill >= 5
    assert decode >= 5


def test_workers_under_way_are_not_asked_for_again():
    looks = Looks(had=(4, 1))
    starting = flooded(alive=1, starting=3)
    asked = {prefill for prefill, _ in looks.looks(starting, 10)}
    assert asked == {4}
    more = dataclasses.replace(
        starting, prefill=dataclasses.replace(starting.prefill, lanes={"default": lane(400, 320_000, 9.0, 0.5)})
    )
    assert {prefill for prefill, _ in looks.looks(more, 10)} == {4}


def test_workers_that_do_not_come_are_not_waited_for_without_end():
    looks = Looks()
    looks.looks(busy(), 1)
    (_, (asked, _)) = looks.looks(flooded(), 2)
    assert asked > 1
    lost = flooded()  # one is alive as before, and none starts
    within = looks.looks(lost, int(2 * POLICY.start_s / 5) - 1)
    assert {prefill for prefill, _ in within} == {asked}
    assert looks.looks(lost, 4)[-1][0] == asked  # what waits needs no more than that
    more = dataclasses.replace(
        lost, prefill=dataclasses.replace(lost.prefill, lanes={"default": lane(900, 720_000, 9.0, 0.5)})
    )
    assert looks.looks(more, 2)[-1][0] > asked


def test_while_some_start_more_traffic_asks_for_more():
    looks = Looks(had=(4, 1))
    assert looks.looks(busy(20.0, alive=(1, 1), starting=3), 2)[-1][0] > 4


def test_prompts_that_decode_computes_for_want_of_a_prefill_worker_ask_for_one():
    none = pool(stage(alive=0), stage(lane(rate=2.0), running=20), local_prompt_tokens_per_s=1600.0)
    assert Looks(had=(0, 1)).look(none).prefill.desired >= 1
    assert Looks(had=(0, 1)).look(dataclasses.replace(none, local_prompt_tokens_per_s=0.0)).prefill.desired == 0


def test_sequences_that_wait_for_a_seat_ask_for_decode_workers():
    full = pool(stage(lane(rate=0.5)), stage(lane(30), alive=1, running=32))
    looks = Looks()
    looks.look(full)
    decision = looks.look(full)
    assert decision.decode.desired == 3
    assert decision.lines()[1] == "decode 1 -> 3: 62 sequences run and wait, 24 a worker hold 50 ms"


def test_blocks_count_where_they_are_scarcer_than_seats():
    large = Speeds(prompt_token_s=0.0005, answer_tokens=250, blocks_per_sequence=1000, sequences_per_worker=24)
    looks = Looks()
    assert looks.looks(dataclasses.replace(busy(1.0), speeds=large), 2)[-1][1] == 6


def test_what_waits_on_the_low_lane_asks_for_one_worker_and_no_more():
    low = pool(stage(dataclasses.replace(lane(9000, 9_000_000, 900.0), arrivals_per_s=50.0)), stage(running=32))
    low = dataclasses.replace(
        low, prefill=dataclasses.replace(low.prefill, lanes={"low": low.prefill.lanes["default"]})
    )
    assert set(Looks().looks(low, 20)) == {(1, 1)}
    assert Looks(had=(0, 0)).looks(low, 1) == [(1, 1)]


# -- zero


def test_from_zero_one_look_is_enough_and_both_stages_start():
    looks = Looks(had=(0, 0))
    assert looks.looks(pool(stage(alive=0), stage(alive=0)), 3)[-1] == (0, 0)
    decision = looks.look(pool(stage(lane(1, 500, 0.3, rate=0.2), alive=0), stage(alive=0)))
    assert (decision.prefill.desired, decision.decode.desired) == (1, 1)


def test_from_zero_decode_starts_alone_where_prefill_is_not_wanted():
    assert Looks(had=(0, 0)).looks(pool(stage(alive=0), stage(lane(1, 20, 0.3), alive=0)), 1) == [(0, 1)]


def test_from_zero_nothing_needs_to_be_measured():
    waits = pool(stage(lane(1, 500, 0.3), alive=0), stage(alive=0), speeds=Speeds())
    decision = Looks(had=(0, 0)).look(waits)
    assert (decision.prefill.desired, decision.decode.desired) == (1, 1)
    assert decision.lines()[0] == "prefill 0 -> 1: its first task waits"


def test_the_cooldown_keeps_nobody_at_zero():
    looks = Looks(had=(1, 1))
    idle, waits = pool(), pool(stage(lane(1, 500, 0.3)))
    assert looks.looks(idle, 61)[-1] == (0, 0)
    assert looks.look(waits, 1).prefill.desired == 1


def test_to_zero_goes_what_was_idle_for_as_long_as_is_set():
    looks = Looks(had=(3, 2))
    looks.look(busy(alive=(3, 2)))
    idle = pool(stage(alive=3), stage(alive=2))
    assert looks.looks(idle, 59)[-1] != (0, 0)
    decision = looks.look(idle)
    assert (decision.prefill.desired, decision.decode.desired) == (0, 0)
    assert decision.lines()[1].endswith("-> 0: nothing came, waited or ran for 300 s")


def test_to_zero_goes_what_never_had_anything_to_measure():
    looks = Looks(had=(1, 1))
    idle = dataclasses.replace(pool(stage(alive=1), stage(alive=1)), speeds=Speeds())
    assert looks.looks(idle, 60)[-1] == (1, 1)
    assert looks.looks(idle, 2)[-1] == (0, 0)


@pytest.mark.parametrize(
    "sign", [{"running": 1}, {"running": None}, {"lanes": {"low": lane(1)}}, {"lanes": {"low": lane(rate=0.1)}}]
)
def test_a_sign_of_life_keeps_a_pool_from_zero(sign):
    looks = Looks()
    assert looks.looks(pool(decode=dataclasses.replace(stage(), **sign)), 100)[-1] == (1, 1)


def test_a_minimum_is_kept_when_idle():
    policy = AutoscaleSettings(prefill=StageScaling(min_workers=1), decode=StageScaling(min_workers=2))
    assert Looks(policy, had=(3, 3)).looks(pool(stage(alive=3), stage(alive=3)), 200)[-1] == (1, 2)


# -- down


def test_fewer_are_asked_for_when_fewer_were_enough_for_the_whole_window():
    looks = Looks(had=(6, 6))
    calm = busy(0.5, alive=(6, 6))
    assert set(looks.looks(calm, 60)) == {(6, 6)}
    assert looks.looks(calm, 2)[-1] == (1, 1)


def test_the_most_that_the_window_needed_stays():
    looks = Looks(had=(6, 6))
    calm, less = busy(0.5, alive=(6, 6)), busy(4.0, alive=(6, 6))
    looks.looks(less, 10)
    assert 1 < looks.looks(calm, 55)[-1][0] < 6


def test_a_look_that_says_nothing_begins_the_window_anew():
    looks = Looks(had=(6, 6))
    calm = busy(0.5, alive=(6, 6))
    looks.looks(calm, 50)
    looks.look(dataclasses.replace(calm, prefill=dataclasses.replace(calm.prefill, running=None)))
    assert {prefill for prefill, _ in looks.looks(calm, 59)} == {6}


def test_nothing_goes_after_a_gap_until_a_window_was_seen_again():
    looks = Looks(had=(6, 6))
    much, calm = busy(6.0, alive=(6, 6)), busy(0.5, alive=(6, 6))
    looks.looks(much, 70)
    assert looks.look(much, 3600).prefill.desired >= 4  # nobody looked for an hour
    assert set(looks.looks(calm, 59)) == {(looks.memory.prefill.desired, looks.memory.decode.desired)}
    assert looks.looks(calm, 20)[-1] == (1, 1)


def test_a_pool_that_nobody_looked_at_was_not_idle():
    looks = Looks()
    looks.look(pool())
    assert looks.look(pool(), 3600).prefill.desired == 1
    assert looks.looks(pool(), 60)[-1] == (0, 0)


def test_nothing_goes_while_others_still_go():
    looks = Looks(had=(6, 6))
    assert looks.looks(busy(0.5, alive=(6, 6), draining=1), 100)[-1] == (6, 1)


def test_after_more_there_are_not_fewer_within_the_cooldown():
    policy = AutoscaleSettings(poll_s=5.0, down_after_s=0.0, cooldown_s=60.0, prefill=WIDE, decode=WIDE)
    looks = Looks(policy)
    looks.look(busy())
    looks.look(flooded())
    grown = looks.look(flooded()).prefill.desired
    calm = busy(0.5, alive=(grown, 1))
    assert {prefill for prefill, _ in looks.looks(calm, 11)} == {grown}
    assert looks.look(calm).prefill.desired == 1
    assert looks.looks(flooded(), 11)[-1][0] == 1  # nor does it turn twice
    assert looks.look(flooded()).prefill.desired > 1


# -- bounds and GPUs


def test_bounds_hold_whatever_waits():
    policy = AutoscaleSettings(prefill=StageScaling(min_workers=2, max_workers=3), decode=StageScaling(max_workers=0))
    looks = Looks(policy, had=(9, 9))
    assert set(looks.looks(flooded(alive=3), 20)) == {(3, 0)}
    assert looks.looks(pool(), 200)[-1] == (2, 0)


def test_both_stages_share_the_gpus_by_what_they_need():
    policy = AutoscaleSettings(gpu_budget=8, prefill=WIDE, decode=WIDE)
    looks = Looks(policy)
    looks.look(busy(20.0))
    said = looks.look(busy(20.0))
    assert said.prefill.desired + said.decode.desired == 8
    assert min(said.prefill.desired, said.decode.desired) >= 3
    assert "do not fit 8 GPUs" in said.lines()[0]


def test_a_stage_gives_gpus_to_the_other_when_its_cooldown_is_over():
    # Given prefill, which has just taken what was free
    policy = AutoscaleSettings(poll_s=5.0, gpu_budget=8, cooldown_s=60.0, prefill=WIDE, decode=WIDE)
    looks = Looks(policy)
    looks.looks(busy(0.5), 1)
    had = looks.looks(pool(stage(lane(900, 800_000, 3.1, rate=0.5), running=1), stage(running=10)), 2)[-1]
    assert had == (7, 1)

    # When decode needs as many
    crowded = pool(stage(lane(900, 800_000, 3.1, rate=0.5), alive=7, running=7), stage(lane(400), alive=1, running=32))
    answers = looks.looks(crowded, 13)

    # Then it gets its share when prefill may have fewer again
    assert set(answers[:11]) == {(7, 1)}
    assert answers[-1] == (4, 4)


def test_with_one_gpu_decode_does_both():
    policy = AutoscaleSettings(gpu_budget=1, prefill=WIDE, decode=WIDE)
    assert Looks(policy, had=(0, 0)).looks(pool(stage(lane(1, 500, 0.1), alive=0), stage(alive=0)), 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (AutoscaleSettings(prefill=StageScaling(min_workers=3, max_workers=2)), "autoscale.prefill.min_workers"),
        (AutoscaleSettings(gpu_budget=3, decode=StageScaling(min_workers=2, gpus=2)), "autoscale.gpu_budget"),
        (AutoscaleSettings(devices="0, 1 0"), "autoscale.devices: 0 is named 2 times"),
    ],
)
def test_settings_that_contradict_each_other_are_named(policy, named):
    with pytest.raises(ConfigError, match=named):
        check(policy)


def test_the_defaults_do_not_contradict_each_other():
    check(AutoscaleSettings())


# -- what cannot be believed


@pytest.mark.parametrize("clock_ms", [None, math.nan, -1, NOW_MS + 60_000, NOW_MS - 60_000])
def test_signals_of_another_time_hold(clock_ms):
    memory = Memory(prefill=StageMemory(4), decode=StageMemory(3))
    decision = decide(dataclasses.replace(flooded(), clock_ms=clock_ms), POLICY, memory, NOW_MS)
    assert (decision.prefill.desired, decision.decode.desired) == (4, 3)
    assert decision.lines()[0].startswith("prefill stays at 4: held, the signals")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1])
@pytest.mark.parametrize("field", ["waiting", "prompt_tokens"])
def test_a_lane_that_cannot_be_believed_holds_its_stage(field, value):
    looks = Looks(had=(4, 3))
    broken = flooded(alive=4)
    said = dataclasses.replace(broken.prefill.lanes["default"], **{field: value})
    broken = dataclasses.replace(broken, prefill=dataclasses.replace(broken.prefill, lanes={"default": said}))
    assert {prefill for prefill, _ in looks.looks(broken, 100)} == {4}


def test_without_measured_speeds_what_is_there_stays():
    unmeasured = dataclasses.replace(flooded(), speeds=Speeds())
    decision = Looks().look(unmeasured)
    assert decision.lines() == [
        "prefill stays at 1: held, prompt_token_s is not known", "decode stays at 1: held, answer_tokens is not known",
    ]  # fmt: skip


def test_a_clock_that_went_back_forgets_times_and_goes_on():
    looks = Looks(had=(6, 6))
    looks.looks(busy(0.5, alive=(6, 6)), 70)
    looks.now_ms -= 3_600_000
    assert looks.looks(busy(0.5, alive=(6, 6)), 1) == [(1, 1)]
    looks.now_ms -= 3_600_000
    looks.look(busy())
    assert looks.looks(flooded(), 3)[-1][0] > 1


# -- memory


def test_at_first_what_is_there_is_taken_over():
    said = pool(stage(lane(rate=1.0), alive=2, starting=1), stage(alive=4))
    decision = decide(said, POLICY, Memory(), NOW_MS)
    assert (decision.prefill.desired, decision.decode.desired) == (3, 4)


@pytest.mark.parametrize("change", [{"alive": None}, {"starting": -1}, {"alive": math.nan}])
def test_what_is_there_at_first_must_be_known(change):
    decision = decide(pool(dataclasses.replace(stage(), **change)), POLICY, Memory(), NOW_MS)
    assert (decision.prefill.desired, decision.decode.desired, decision.memory) == (None, None, Memory())
    assert decision.lines()[0] == "prefill stays as it is: it is not known how many there are"
    assert decide(at(pool(), NOW_MS - 60_000), POLICY, Memory(), NOW_MS).prefill.desired is None


def test_a_worker_that_died_is_still_wanted():
    looks = Looks(had=(2, 2))
    assert looks.looks(busy(0.5, alive=(1, 0)), 2)[-1] == (2, 2)


def test_the_same_values_give_the_same_decision():
    memory = Memory(prefill=StageMemory(2), decode=StageMemory(2))
    assert decide(flooded(), POLICY, memory, NOW_MS) == decide(flooded(), POLICY, memory, NOW_MS)
    assert memory == Memory(prefill=StageMemory(2), decode=StageMemory(2))


def test_memory_stays_small():
    looks = Looks()
    looks.looks(busy(3.0), 2000, seconds=1.0)
    assert len(looks.memory.arrivals) <= 40
    assert len(looks.memory.prefill.needs) <= 10
