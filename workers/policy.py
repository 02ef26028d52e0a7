"""What a worker decides from values at hand: which lanes a claim looks at, and how long a failed task waits. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.queue import LaneLook

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


def free_for_share(share: float, total: int, used: int) -> int:
    """What a lane may still take of a room of which it may fill a share. Where nothing is used it may take all: a task that is
    larger than the share would otherwise never start."""
    return total if used == 0 else int(share * total) - used


def backoff_s(attempts: int, first_s: float, longest_s: float, chance: float) -> float:
    """The wait before a task is tried again after `attempts` failures without progress (the first: 0): doubled each time up to
    `longest_s`, of which `chance` (0 to 1) takes up to a half away, so that tasks that failed together come back apart."""
    whole: float = min(longest_s, first_s * 2.0 ** min(attempts, 30))
    return whole * (1 - chance / 2)
