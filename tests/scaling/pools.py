"""Signals of pools as tests need them: all of a pool that is well, but for what a test says."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.scaling.signals import LaneSignals, PoolSignals, Speeds, StageSignals

SPEEDS = Speeds(
    prompt_token_s=0.0005, inter_token_s=0.04, answer_tokens=250, blocks_per_sequence=66, sequences_per_worker=24
)
NOW_MS = 100_000_000


def lane(
    waiting: float = 0, tokens: float = 0, oldest_s: float = 0.0, rate: float = 0.0, of: float = 800
) -> LaneSignals:
    """`rate` requests a second of `of` prompt tokens."""
    return LaneSignals(waiting, tokens, oldest_s, rate, rate * of)


def stage(said: LaneSignals | None = None, **values: Any) -> StageSignals:
    alive = values.get("alive", 1)
    known = {"alive": alive, "starting": 0, "draining": 0, "running": 0, "blocks_used": 0, "blocks_total": alive * 4096}
    return StageSignals(**{"lanes": {"default": said or lane()}, "start_s": 30.0, **known, **values})


def pool(prefill: StageSignals | None = None, decode: StageSignals | None = None, **values: Any) -> PoolSignals:
    said: dict[str, Any] = {"clock_ms": NOW_MS, "speeds": SPEEDS, **values}
    return PoolSignals(prefill=prefill or stage(), decode=decode or stage(), **said)


def at(signals: PoolSignals, now_ms: int) -> PoolSignals:
    """The same, read at another time."""
    return dataclasses.replace(signals, clock_ms=now_ms)
