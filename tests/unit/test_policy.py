"""What a worker decides from values: the order of lanes, shares of the room for handles, and how long a retry waits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.protocol import BackendInput, Log, RoutingHints, SamplingOptions, StopConditions
from pipeline.queue import Delivery
from workers.policy import GUARD_EVERY, backoff_s, engines_view, free_for_share, held_back, is_news, lane_looks

FREE = {"high": 9, "default": 8, "low": 5}


def test_a_claim_looks_at_the_own_lane_first_and_then_by_priority() -> None:
    looks = lane_looks("@w", 0, FREE)
    assert [(look.lane, look.free_blocks, look.which) for look in looks] == [
        ("@w", 9, ""), ("high", 9, ""), ("default", 8, ""), ("low", 5, ""),
    ]  # fmt: skip


def test_a_worker_that_is_ahead_leaves_to_others_what_is_not_its_own() -> None:
    looks = lane_looks("@w", 0, FREE, is_ahead=True)
    assert [(look.lane, look.which) for look in looks] == [
        ("@w", ""), ("high", "spare"), ("default", "spare"), ("low", "spare"),
    ]  # fmt: skip


def test_one_claim_in_eight_looks_for_what_has_aged_on_lower_lanes_first() -> None:
    guarded = [
        turn for turn in range(4 * GUARD_EVERY) if any(look.which == "aged" for look in lane_looks("@w", turn, FREE))
    ]
    assert [b - a for a, b in itertools.pairwise(guarded)] == [GUARD_EVERY] * 3
    lanes = [look.lane for look in lane_looks("@w", guarded[0], FREE)]
    assert lanes == ["@w", "low", "default", "high", "default", "low"]


def test_what_is_held_back_of_a_lane_comes_when_it_has_aged() -> None:
    assert [look.lane for look in lane_looks("@w", 0, FREE, held_back={"low"})] == ["@w", "high", "default"]
    guarded = lane_looks("@w", GUARD_EVERY - 1, FREE, held_back={"low"})
    assert [(look.lane, look.which) for look in guarded if look.lane == "low"] == [("low", "aged")]


@pytest.mark.parametrize(
    ("fill", "came_s", "held"),
    [
        (0.0, {"default": 1.0}, set()),  # an idle worker takes anything
        (0.04, {"default": 1.0}, set()),
        (0.05, {"default": 1.0}, {"low"}),
        (0.5, {"high": 1.0}, {"low", "default"}),
        (0.5, {"high": 60.0, "default": 1.0}, {"low"}),
        (1.5, {"low": 0.1}, set()),  # nobody else comes: steps may be full
        (1.5, {}, set()),
        (1.5, {"default": 60.0}, set()),
    ],
)
def test_while_tasks_of_higher_lanes_come_lower_ones_fill_a_share_of_a_step(
    fill: float, came_s: dict[str, float], held: set[str]
) -> None:
    shares = {"high": 1.0, "default": 0.4, "low": 0.05}
    assert held_back(fill, shares, came_s) == held


@pytest.mark.parametrize(("used", "free"), [(0, 100), (1, 49), (50, 0), (80, -30)])
def test_a_lane_fills_its_share_or_an_empty_room(used: int, free: int) -> None:
    assert free_for_share(0.5, 100, used) == free


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 5), st.floats(0, 60))
def test_backoff_grows_and_stays_within_its_limits(
    attempts: int, chance: float, first_s: float, longest_s: float
) -> None:
    wait_s = backoff_s(attempts, first_s, longest_s, chance)
    assert 0 <= wait_s <= longest_s
    assert wait_s >= min(first_s, longest_s) / 2
    assert backoff_s(attempts + 1, first_s, longest_s, chance) >= wait_s


def test_backoff_is_doubled_each_time() -> None:
    assert [backoff_s(attempts, 0.5, 10, 0) for attempts in range(6)] == [0.5, 1, 2, 4, 8, 10]
    assert backoff_s(0, 0.5, 10, 1) == 0.25


def delivery(lane: str, priority: str) -> Delivery:
    return Delivery("r-1", 4, "decode", lane, b"", b"", 0, 0, "", 1, log=Log.empty(1), priority=priority)


def asked(**fields: object) -> BackendInput:
    options = {"stop_conditions": StopConditions(), "sampling_options": SamplingOptions(), **fields}
    return BackendInput(request_id="r-1", model="m", token_ids=[1], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("priority", "number"), [("high", 0), ("default", 1), ("low", 2)])
@pytest.mark.parametrize("lane", ["low", "@decode-0"])
def test_an_engine_is_told_the_priority_that_was_asked_for_whatever_lane_brought_it(
    lane: str, priority: str, number: int
) -> None:
    view = engines_view(asked(), delivery(lane, priority))
    assert view.request_id == "r-1@4"
    assert view.routing == RoutingHints(priority=number)


def test_other_hints_stay_beside_the_priority() -> None:
    view = engines_view(asked(routing=RoutingHints(lora_name="a", cache_salt="b")), delivery("high", "high"))
    assert view.routing == RoutingHints(lora_name="a", cache_salt="b")


def test_that_leases_are_held_back_is_said_once_when_it_begins_and_once_when_it_ends() -> None:
    nothing, held = {"parked": 0, "held_back": 0}, {"parked": 0, "held_back": 1}
    sweeps = [{}, nothing, held, held, {}, held, nothing, nothing, held]
    told, before = [], {}
    for swept in sweeps:
        told.append(is_news(swept, before))
        before = swept or before
    assert told == [False, False, True, False, False, False, True, False, True]


def test_a_sweep_that_did_something_is_told_each_time() -> None:
    did = {"parked": 2, "held_back": 1}
    assert is_news(did, did)
