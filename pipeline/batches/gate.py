"""How many requests of a batch may be under way: what live traffic leaves, and no more than keeps the workers busy.

Requests of batches wait on the low lane, so live ones are claimed before them; what they still cost live traffic is the step that has
begun, the length of decode's steps, and the wait for a slot where none is free. So the window follows the slots that live requests leave,
less a share that stays free for the next of them, and shrinks by half whenever live requests have to wait (additive increase,
multiplicative decrease, as TCP has it: Chiu and Jain, 1989). Where there are none it is more than the slots, so that none is ever idle.
"""

from __future__ import annotations

import dataclasses

from pipeline.queue import STAGES
from pipeline.said import said_by
from pipeline.snapshot import PoolSnapshot

# requests that are always under way (fewer where fewer are set): the deadline of a batch is kept by what trickles, and by the age guard
LEAST = 2
AHEAD = 0.25  # of the slots: so many requests wait for the next free one, where nobody else waits for it
GROWTH = 0.25  # of the target, a look
LIVE = ("high", "default")  # lanes


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """A pool as a batch sees it. `slots`: choices that its decode workers run at once; `live`: choices of live requests that run, or will
    when their prefill is done; `low_prefilling`: requests of batches (and others of their lane) in prefill; `blocks_used`: share of
    the decode workers' blocks."""

    slots: int
    live: int
    live_waiting: int
    low_prefilling: int
    low_waiting: int
    blocks_used: float


def next_window(window: int, in_flight: int, load: Load, *, most: int, live_share: float) -> int:
    """The window after a look at the pool. `in_flight`: requests of this batch that wait and run; `most`: what is set; `live_share`: of the
    slots, kept free while there are live requests."""
    least = min(LEAST, most)
    if load.slots == 0:
        return least
    if load.live_waiting > 0:
        return max(least, min(window, in_flight) // 2)
    spare = load.slots * (-live_share if load.live else AHEAD)
    free = load.slots - load.live + spare + load.low_prefilling  # which hold no slot yet
    if load.blocks_used > 1 - live_share and load.low_waiting:
        free = min(free, in_flight - load.low_waiting)  # more would only preempt
    target = max(least, min(most, int(free)))
    return min(target, window + max(1, int(GROWTH * target))) if load.live else target


def load_of(snapshot: PoolSnapshot, stage: str = "") -> Load:
    """What is known of a pool, or of one `stage` of it beside those of generations. Workers that say nothing, or claim nothing, count as
    none; what waits and runs is counted by the scripts, and so is never old."""
    told = [said for info in snapshot.workers.get(stage or "decode", {}).values() if (said := said_by(info)).claims]
    stages = (stage,) if stage else STAGES
    blocks = sum(said.engine.num_blocks for said in told)
    return Load(
        slots=sum(said.engine.max_num_seqs for said in told),
        live=sum(snapshot.running(stage, lane) for stage in stages for lane in LIVE),
        live_waiting=sum(snapshot.waiting(stage, lane) for stage in stages for lane in LIVE),
        low_prefilling=0 if stage else snapshot.running("prefill", "low"),
        low_waiting=sum(snapshot.waiting(stage, "low") for stage in stages),
        blocks_used=sum(said.stats.blocks_used for said in told) / blocks if blocks else 0.0,
    )
