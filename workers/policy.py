"""What a worker decides from values at hand: which lanes a claim looks at, what an engine is told of a request, how long a
failed task waits, and which sweeps are worth a line. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from msgspec.structs import replace

from pipeline.protocol import BackendInput, RoutingHints
from pipeline.queue import HELD_BACK, LANES, Delivery, LaneLook

LATELY_S = 10.0  # for so long after a task of a lane the next one is expected
GUARD_EVERY = 8  # each so many claims what has aged on lower lanes goes first


def lane_looks(
    own: str, turn: int, free_blocks: Mapping[str, int], *, is_ahead: bool = False, held_back: Collection[str] = ()
) -> list[LaneLook]:
    """The looks of a worker's claim number `turn`, in order: its own lane, then high, default and low.

    `is_ahead`: what it claims would wait behind its running step, so it leaves alone what others may start now.

    Each eighth claim first looks for what has aged on the lower lanes, the lowest first: they keep moving under any load of
    higher ones, and take at most an eighth of the claims. `free_blocks`: what a task of each lane may take; `held_back`: lanes of
    which it takes only what has aged.
    """
    looks = [LaneLook(own, free_blocks["high"])]
    if turn % GUARD_EVERY == GUARD_EVERY - 1:
        looks += [LaneLook(lane, free_blocks[lane], which="aged") for lane in ("low", "default")]
    return looks + [
        LaneLook(lane, free_blocks[lane], "spare" if is_ahead else "") for lane in LANES if lane not in held_back
    ]


def held_back(fill: float, step_share: Mapping[str, float], came_s: Mapping[str, float]) -> set[str]:
    """Lanes of which a worker leaves tasks alone for now, so that the next one of a higher lane finds a short step before it and not a
    long one, which ends when it ends. `fill`: how much of a step's tokens it holds; `step_share`: of a step, by lane, to which a lane
    fills it while tasks of higher lanes come; `came_s`: seconds since one of each lane did.
    """
    lately = [lane for lane in LANES if came_s.get(lane, math.inf) < LATELY_S]
    first = LANES.index(lately[0]) if lately else len(LANES)
    return {lane for at, lane in enumerate(LANES) if at > first and fill >= step_share[lane]}


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


def is_news(swept: Mapping[str, int], before: Mapping[str, int]) -> bool:
    """Whether a sweep did something, or began or ceased to hold leases back: that is so for a whole lease, and said once."""
    did_something = any(count for name, count in swept.items() if name != HELD_BACK)
    return did_something or (HELD_BACK in swept and swept[HELD_BACK] != before.get(HELD_BACK, 0))
