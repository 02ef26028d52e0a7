"""What a supervisor does about a decision: how many workers it starts, which it lets go, on which GPUs. Pure functions of values."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence

import msgspec

from pipeline.config import AutoscaleSettings
from pipeline.queue import STAGES


class Phase(enum.Enum):
    """How far a worker is. What leaves or is broken is no capacity, and counts for none."""

    STARTING = "starting"  # until Redis lists it
    WORKING = "working"
    LEAVING = "leaving"  # it was asked to; it keeps its GPUs until it has ended
    BROKEN = "broken"  # it ended by itself, and its place stays empty for a while


HOPEFUL = (Phase.STARTING, Phase.WORKING, Phase.BROKEN)  # what a stage counts on; a broken one will be started again


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a worker has to do. `kept`: blocks that it keeps until others have fetched them, as handles or bytes; None: it has not said."""

    kept: int | None = None
    tasks: int = 0
    blocks: int = 0

    @property
    def order(self) -> tuple[float, int, int]:
        """Less is less to lose. Who says nothing may have anything."""
        return (float("inf") if self.kept is None else self.kept, self.tasks, self.blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may go."""

    number: int
    phase: Phase
    work: Work = Work()


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """How many to start and how many to let go; one of the two is 0."""

    start: int = 0
    let_go: int = 0


def next_step(desired: int | None, phases: Collection[Phase], others: int) -> Step:
    """The way from what there is to what is desired. `others`: workers that somebody else started, which stay. While some leave, no
    more are asked to. Where nothing is known to be desired nothing is done."""
    if desired is None:
        return Step()
    there = sum(phase in HOPEFUL for phase in phases)
    wanted = max(0, desired - others)
    if there < wanted:
        return Step(start=wanted - there)
    if there > wanted and Phase.LEAVING not in phases:
        return Step(let_go=there - wanted)
    return Step()


def who_goes(candidates: Sequence[Candidate], count: int) -> list[int]:
    """The numbers of those that cost least: broken ones, those that only start, then by their work; the newest of equals."""
    ranks = {Phase.BROKEN: 0, Phase.STARTING: 1, Phase.WORKING: 2}
    able = [one for one in candidates if one.phase in ranks]
    able.sort(key=lambda one: (ranks[one.phase], one.work.order, -one.number))
    return [one.number for one in able[:count]]


def first_free(numbers: Collection[int]) -> int:
    """The lowest number that is not taken."""
    return next(number for number in range(len(numbers) + 1) if number not in numbers)


def environment_of(gpus: Sequence[str], mine: Sequence[str]) -> dict[str, str]:
    """What a worker's process is told of GPUs: its own and no others, where there is a list of them."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if gpus else {}


def within_gpus(
    policy: AutoscaleSettings, gpus: Sequence[str], of_other_pools: int, others: Mapping[str, int]
) -> AutoscaleSettings:
    """The policy of a pool on this machine's GPUs: its budget is what other pools leave. Workers of others have their own."""
    if not gpus:
        return policy
    foreign = sum(count * policy.stage(stage).gpus for stage, count in others.items())
    left = len(gpus) - of_other_pools
    budget = min(left + foreign, policy.gpu_budget or left + foreign)
    if budget > 0:
        return msgspec.structs.replace(policy, gpu_budget=budget)
    bounds = {
        stage: msgspec.structs.replace(policy.stage(stage), min_workers=0, max_workers=0)
        for stage in STAGES
        if policy.stage(stage).gpus
    }  # 0 would be no limit at all
    return msgspec.structs.replace(policy, gpu_budget=0, **bounds)
