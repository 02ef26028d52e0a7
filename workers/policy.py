"""What a worker decides from values at hand: which lanes a claim looks at, what an engine is told of a request, and how long a
failed task waits. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from pipeline.protocol import BackendInput, RoutingHints
from pipeline.queue import LANES, Delivery, LaneLook

GUARD_EVERY = 8  # each so many claims what has aged on lower lanes goes first


def lane_looks(own: str, turn: int, free_blocks: Mapping[str, int]) -> list[LaneLook]:
    """The looks of a worker's claim number `turn`, in order: its own lane, then high, default and low.

    Each eighth claim first looks for what has aged on the lower lanes, the lowest first: they keep moving under any load of
    higher ones, and take at most an eighth of the claims. `free_blocks`: what a task of each lane may take.
    """
    looks = [LaneLook(own, free_blocks["high"])]
    if turn % GUARD_EVERY == GUARD_EVERY - 1:
        looks += [LaneLook(lane, free_blocks[lane], aged=True) for lane in ("low", "default")]
    return looks + [LaneLook(lane, free_blocks[lane]) for lane in ("high", "default", "low")]


def engines_view(request: BackendInput, delivery: Delivery) -> BackendInput:
    """The request as the engine gets it: under the name of its delivery, and with the priority of its lane."""
    priority = LANES.index(delivery.priority) if delivery.priority in LANES else 0
    routing = replace(request.routing or RoutingHints(), priority=priority)
    return replace(request, request_id=delivery.key, routing=routing)


def free_for_share(share: float, total: int, used: int) -> int:
    """What a lane may still take of a room of which it may fill a share. Where nothing is used it may take all: a task that is
    larger than the share would otherwise never start."""
    return total if used == 0 else int(share * total) - used


def backoff_s(attempts: int, first_s: float, longest_s: float, chance: float) -> float:
    """The wait before a task is tried again after `attempts` failures without progress (the first: 0): doubled each time up to
    `longest_s`, of which `chance` (0 to 1) takes up to a half away, so that tasks that failed together come back apart."""
    whole: float = min(longest_s, first_s * 2.0 ** min(attempts, 30))
    return whole * (1 - chance / 2)
