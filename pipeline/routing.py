"""Where a request goes: pure functions of values at hand."""

from __future__ import annotations

import dataclasses

from pipeline.config import RouterSettings

LANE_OF_TIER = {
    "auto": "default", "default": "default", "scale": "default", "priority": "high", "fast": "high", "flex": "low", "batch": "low"
}  # fmt: skip
TIER_OF_LANE = {"high": "priority", "default": "default", "low": "flex"}


def lane_of(priority: int | None, service_tier: str | None) -> str:
    """The lane of a request: by its priority (lower goes first, 0 is the default), else by its service tier."""
    if priority is not None:
        return "high" if priority < 0 else "low" if priority > 0 else "default"
    return LANE_OF_TIER[service_tier or "default"]


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """The stage that a request starts in and the lane there. `why` is for logs and metrics."""

    stage: str
    lane: str
    why: str


def blocks_needed(prompt_tokens: int, n: int, block_size: int) -> int:
    """Blocks that a request needs to start: its prompt's, and room for the next token of each choice."""
    return (prompt_tokens + block_size - 1) // block_size + n


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """The largest task that a worker could ever start and export, in its blocks."""

    blocks: int
    block_size: int

    def holds(self, prompt_tokens: int, n: int) -> bool:
        """Whether a request fits in it."""
        return blocks_needed(prompt_tokens, n, self.block_size) <= self.blocks


@dataclasses.dataclass(frozen=True, slots=True)
class PoolLoad:
    """What the router knows of a pool: waiting prefill tasks, how many workers of each stage live, and the room of each living prefill
    worker (empty: not all have said)."""

    prefill_waiting: int
    prefill_alive: int
    decode_alive: int
    prefill_rooms: tuple[Room, ...] = ()


class DisaggregatedRouter:
    """Whether prefill runs remotely or on the decode worker (the rule of NVIDIA Dynamo's conditional disaggregation)."""

    def __init__(self, policy: RouterSettings) -> None:
        self._policy = policy

    def route(self, prompt_tokens: int, hit_tokens: int, load: PoolLoad, lane: str = "default", *, n: int = 1) -> Route:
        """Remote when the effective prompt (prompt minus `hit_tokens` that decode workers hold) is longer than
        `max_local_prefill_length` and fewer than `max_prefill_queue_size` tasks wait;
        local also while only decode workers live, and where no prefill worker could hold the request with its `n` choices.
        """
        if load.prefill_alive == 0 and load.decode_alive > 0:
            return Route("decode", lane, "no prefill worker alive")
        if load.prefill_rooms and not any(room.holds(prompt_tokens, n) for room in load.prefill_rooms):
            return Route("decode", lane, "larger than any prefill worker")
        if prompt_tokens - hit_tokens <= self._policy.max_local_prefill_length:
            return Route("decode", lane, "short prompt")
        if load.prefill_waiting >= self._policy.max_prefill_queue_size:
            return Route("decode", lane, "prefill queue full")
        return Route("prefill", lane, "remote")


def retry_after_s(waiting: int, drained_per_s: float) -> float:
    """When a refused client should come again: the time in which what waits drains, between 1 and 120 s."""
    if drained_per_s <= 0:
        return 30.0
    return min(120.0, max(1.0, waiting / drained_per_s))
