"""What is believed of the signals, and what is missing in them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pipeline.scaling.signals import LaneSignals, PoolSignals, Speeds, StageSignals, believed, doubt


def whole() -> PoolSignals:
    """Signals that nothing is missing in."""
    lane = LaneSignals(waiting=0, prompt_tokens=0, arrivals_per_s=0.0, prompt_tokens_per_s=0.0)
    stage = StageSignals(lanes={"default": lane, "low": lane}, running=0, alive=1, starting=0, draining=0)
    speeds = Speeds(prompt_token_s=0.001, answer_tokens=100, sequences_per_worker=8)
    return PoolSignals(clock_ms=1, prefill=stage, decode=stage, speeds=speeds)


@pytest.mark.parametrize("value", [None, -1, -0.001, math.nan, math.inf, -math.inf, 1e15])
def test_what_is_missing_or_absurd_is_not_believed(value):
    assert not believed(value)


@pytest.mark.parametrize("value", [0, 1, 0.5, 1e12])
def test_what_can_be_is_believed(value):
    assert believed(value)


def test_nothing_is_missing_in_whole_signals():
    assert [doubt(whole(), name) for name in ("prefill", "decode", "")] == ["", "", ""]


@pytest.mark.parametrize("field", ["alive", "starting", "draining", "running"])
def test_a_missing_number_is_named_for_its_stage_alone(field):
    signals = whole()
    signals = dataclasses.replace(signals, prefill=dataclasses.replace(signals.prefill, **{field: None}))
    assert doubt(signals, "prefill") == f"prefill {field} is not known"
    assert doubt(signals, "decode") == doubt(signals) == ""


@pytest.mark.parametrize("field", ["served_per_s", "predicted_wait_s", "start_s", "blocks_used", "blocks_total"])
def test_what_is_not_needed_may_be_missing_but_not_absurd(field):
    signals = whole()
    stage = dataclasses.replace(signals.decode, **{field: math.nan})
    assert doubt(dataclasses.replace(signals, decode=stage), "decode") == f"decode {field} cannot be nan"
    assert doubt(signals, "decode") == ""


@pytest.mark.parametrize("field", ["waiting", "prompt_tokens", "oldest_s"])
def test_every_lane_must_say_what_waits(field):
    signals = whole()
    lane = dataclasses.replace(LaneSignals(1, 10, 0.5, 0.0, 0.0), **{field: None})
    stage = dataclasses.replace(signals.prefill, lanes={"high": lane})
    assert doubt(dataclasses.replace(signals, prefill=stage), "prefill") == f"prefill {field} on high is not known"


def test_arrivals_of_both_stages_are_needed_to_expect_any():
    signals = whole()
    lane = LaneSignals(0, 0, None, -1.0, 0.0)
    stage = dataclasses.replace(signals.decode, lanes={"high": lane})
    assert doubt(dataclasses.replace(signals, decode=stage)) == "decode arrivals_per_s on high cannot be -1"
    assert doubt(PoolSignals()) == "prefill lanes is not known"


def test_promises_are_made_to_all_lanes_but_low():
    lanes = {name: LaneSignals(1, 100, age, 2.0, 200.0) for name, age in (("high", 1), ("@w", 3), ("low", 99))}
    stage = StageSignals(lanes=lanes)
    assert (stage.promised("waiting"), stage.promised("prompt_tokens"), stage.oldest_s) == (2, 200, 3)
    signals = PoolSignals(prefill=stage, decode=stage, local_prompt_tokens_per_s=50.0)
    assert (signals.requests_per_s, signals.prompt_tokens_per_s) == (8, 450)


def test_what_waits_on_any_lane_calls():
    assert StageSignals(lanes={"low": LaneSignals(waiting=1), "high": LaneSignals()}).is_called
    assert not StageSignals(lanes={"low": LaneSignals(waiting=math.nan), "high": LaneSignals(waiting=-1)}).is_called


@pytest.mark.parametrize(
    "change", [{"running": 1}, {"running": None}, {"lanes": {}}, {"lanes": {"low": LaneSignals(1, arrivals_per_s=0.0)}}]
)
def test_a_stage_is_empty_only_when_that_is_certain(change):
    assert whole().prefill.is_empty
    assert not dataclasses.replace(whole().prefill, **change).is_empty
