"""Routing decisions are functions of values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.client import drained_per_s
from pipeline.config import RouterSettings
from pipeline.queue import LANES
from pipeline.routing import (
    LANE_OF_TIER,
    TIER_OF_LANE,
    DisaggregatedRouter,
    PoolLoad,
    Room,
    blocks_needed,
    lane_of,
    retry_after_s,
)  # fmt: skip
from pipeline.snapshot import PoolSnapshot

POLICY = RouterSettings(max_local_prefill_length=100, max_prefill_queue_size=5)


def stage(prompt: int, hits: int = 0, waiting: int = 0, prefill: int = 1, decode: int = 1) -> str:
    return DisaggregatedRouter(POLICY).route(prompt, hits, PoolLoad(waiting, prefill, decode)).stage


def test_long_prompts_go_to_prefill_and_short_ones_do_not() -> None:
    assert stage(101) == "prefill"
    assert stage(100) == "decode"


def test_what_decode_workers_hold_makes_a_prompt_shorter() -> None:
    assert stage(300, hits=200) == "decode"
    assert stage(300, hits=199) == "prefill"


def test_a_long_prefill_queue_keeps_prefill_local() -> None:
    assert stage(1000, waiting=4) == "prefill"
    assert stage(1000, waiting=5) == "decode"


def test_without_prefill_workers_everything_goes_on_locally_and_without_any_it_waits_for_prefill() -> None:
    assert stage(1000, prefill=0) == "decode"
    assert stage(1000, prefill=0, decode=0) == "prefill"


def test_the_lane_is_the_callers() -> None:
    route = DisaggregatedRouter(POLICY).route(1000, 0, PoolLoad(0, 1, 1), "high")
    assert (route.stage, route.lane, route.why) == ("prefill", "high", "remote")


def test_settings_changed_at_run_time_win_over_the_initial_ones() -> None:
    changed = PoolSnapshot(settings={"max_local_prefill_length": "7", "something else": "1"}).router(POLICY)
    assert changed == RouterSettings(max_local_prefill_length=7, max_prefill_queue_size=5)


@given(st.integers(0, 10_000), st.floats(0, 1e6))
def test_retry_after_lies_between_one_second_and_two_minutes(waiting: int, rate: float) -> None:
    assert 1.0 <= retry_after_s(waiting, rate) <= 120.0


def test_the_drain_rate_follows_what_was_claimed() -> None:
    waiting = {"waiting:prefill:default": 5}
    before = PoolSnapshot(time_ms=1000, counters={"claimed:prefill:default": 10, "admitted": 50, **waiting})
    after = PoolSnapshot(time_ms=3000, counters={"claimed:prefill:default": 30, "admitted": 90, **waiting})
    rates = drained_per_s({}, before, after)
    assert rates == {"prefill:default": 10.0}
    later = PoolSnapshot(time_ms=4000, counters={"claimed:prefill:default": 30})
    assert drained_per_s(rates, after, later) == {"prefill:default": 9.0}
    idle = PoolSnapshot(time_ms=9000, counters={"claimed:prefill:default": 30})
    assert drained_per_s(rates, later, idle) == rates  # nothing waited: that says nothing of the pace


def test_blocks_to_start_are_those_of_the_prompt_and_one_a_choice() -> None:
    assert blocks_needed(1, 1, 16) == 2
    assert blocks_needed(16, 1, 16) == 2
    assert blocks_needed(17, 3, 16) == 5


def test_what_no_prefill_worker_could_hold_stays_local() -> None:
    router = DisaggregatedRouter(POLICY)
    load = PoolLoad(0, 1, 1, prefill_rooms=(Room(15, 16), Room(8, 32)))  # blocks of one size here, of another there
    assert [router.route(tokens, 0, load).stage for tokens in (224, 225)] == ["prefill", "decode"]
    assert [router.route(200, 0, load, n=n).stage for n in (1, 2, 3)] == ["prefill", "prefill", "decode"]
    assert router.route(10_000, 0, PoolLoad(0, 1, 1)).stage == "prefill"


@pytest.mark.parametrize(
    ("priority", "tier", "lane"),
    [
        (None, None, "default"),
        (None, "auto", "default"),
        (None, "default", "default"),
        (None, "priority", "high"),
        (None, "flex", "low"),
        (None, "batch", "low"),
        (-5, None, "high"),
        (0, None, "default"),
        (7, None, "low"),
        (-1, "flex", "high"),
        (0, "priority", "default"),
        (1, "priority", "low"),
    ],
)
def test_priority_decides_the_lane_and_without_it_the_service_tier(
    priority: int | None, tier: str | None, lane: str
) -> None:
    assert lane_of(priority, tier) == lane


def test_the_readme_of_the_api_lists_the_tiers() -> None:
    text = (Path(__file__).parents[2] / "api" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `service_tier` (.+?) \| `(\w+)` \|", text, re.MULTILINE))
    assert {tier: lane for tiers, lane in rows.items() for tier in re.findall(r"`(\w+)`", tiers)} == LANE_OF_TIER
    assert set(TIER_OF_LANE) == set(LANES)
