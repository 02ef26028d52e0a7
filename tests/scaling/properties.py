"""What must hold in every look at every trace: one simulated run a seed, with settings of its own, and signals that fail now and then.

A run follows Baton's rule; beside each look, others are made from the same memory: with more in a queue, and with signals broken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import random
from collections.abc import Iterator

from pipeline.config import AutoscaleSettings, StageScaling
from pipeline.queue import STAGES
from pipeline.scaling.budget import gpus
from pipeline.scaling.memory import Memory
from pipeline.scaling.policy import Decision, check, decide
from pipeline.scaling.signals import LaneSignals, PoolSignals, Speeds, StageSignals, believed, doubt
from tests.scaling.rules import Baton
from tests.scaling.simulator import Machines, Simulation
from tests.scaling.traces import SHAPES, make

LENGTH_S = 600.0
FAULTS = 0.03  # of the looks
ASKED = 0.25  # of the looks, beside which others are made
ABSURD = (None, math.nan, math.inf, -1, -0.5, 1e15)


def violations(seed: int, length_s: float = LENGTH_S) -> list[str]:
    """What is wrong in the run of a seed; empty when all is well."""
    shape = list(SHAPES)[seed % len(SHAPES)]
    chance = random.Random(seed)
    policy = settings(chance)
    check(policy)
    watched = Watched(policy, chance)
    machines = Machines(start_s=chance.choice((5.0, 30.0, 90.0)))
    Simulation(make(shape, seed, length_s), watched, machines, longest_s=3 * length_s).run()
    watched.wrong += turns(watched.decisions, policy)
    return [f"seed {seed}, {shape}: {wrong}" for wrong in watched.wrong]


def settings(chance: random.Random) -> AutoscaleSettings:
    """Settings of all kinds that do not contradict each other."""

    def bounds() -> StageScaling:
        least = chance.choice((0, 0, 1, 3))
        return StageScaling(
            min_workers=least, max_workers=least + chance.choice((1, 4, 16)), gpus=chance.choice((0, 1, 1, 2))
        )

    policy = AutoscaleSettings(
        poll_s=5.0, ttft_s=chance.choice((0.5, 2.0, 10.0)), itl_ms=chance.choice((30.0, 50.0)), up_after=chance.choice((1, 2, 3)),
        down_after_s=chance.choice((0.0, 30.0, 120.0)), cooldown_s=chance.choice((0.0, 30.0, 60.0)), prefill=bounds(), decode=bounds(),
        idle_s=chance.choice((15.0, 60.0, 300.0)),
    )  # fmt: skip
    least = gpus({"prefill": policy.prefill.min_workers, "decode": max(1, policy.decode.min_workers)}, policy)
    budget = chance.choice((0, 0, least + 1, least + 6))
    return _replaced(policy, gpu_budget=budget)


class Watched(Baton):
    """Baton's rule, each look of which is checked."""

    def __init__(self, policy: AutoscaleSettings, chance: random.Random) -> None:
        super().__init__(policy)
        self.chance = chance
        self.wrong: list[str] = []
        self.initial = tuple(policy.stage(name).min_workers for name in STAGES)  # type: ignore[assignment]

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int | None, int | None]:
        if self.chance.random() < FAULTS:
            signals = broken(signals, self.chance)
        memory = self.memory
        answer = super().desired(signals, now_ms)
        decision = self.decisions[-1][1]
        self.wrong += [f"{now_ms / 1000:g} s: {wrong}" for wrong in self._checked(signals, decision)]
        if self.chance.random() < ASKED:
            self.wrong += [f"{now_ms / 1000:g} s: {wrong}" for wrong in self._asked(signals, decision, memory, now_ms)]
        return answer

    def _asked(self, signals: PoolSignals, decision: Decision, memory: Memory, now_ms: int) -> Iterator[str]:
        """Other looks from the same memory."""
        fault = broken(signals, self.chance)
        yield from self._checked(fault, decide(fault, self.policy, memory, now_ms))
        if any(doubt(signals, name) for name in ("", *STAGES)):
            return
        for name in STAGES:
            more = decide(crowded(signals, name, self.chance), self.policy, memory, now_ms)
            gives_way = name == "prefill" and self.policy.gpu_budget and decision.decode.before == 0
            if (more.stage(name).desired or 0) < (decision.stage(name).desired or 0) and not gives_way:
                yield f"more queue, fewer workers of {name}: {more.lines()}, {decision.lines()}"

    def _checked(self, signals: PoolSignals, decision: Decision) -> Iterator[str]:
        if decision.prefill.desired is None or decision.decode.desired is None:
            if doubt(signals, "prefill") or doubt(signals, "decode") or not believed(signals.clock_ms):
                return
            yield f"nothing was doubtful: {decision.lines()}"
            return
        if (
            self.policy.gpu_budget
            and gpus({name: decision.stage(name).desired for name in STAGES}, self.policy) > self.policy.gpu_budget
        ):
            yield f"more GPUs than there are: {decision.lines()}"
        for name in STAGES:
            bounds, said = self.policy.stage(name), decision.stage(name)
            if not bounds.min_workers <= said.desired <= bounds.max_workers:
                yield f"out of bounds: {decision.lines()}"
            is_asleep = said.why.startswith("nothing came")
            if said.before > 0 and (doubt(signals, name, is_asleep=is_asleep) or doubt(signals)) and said.is_change:
                yield f"not held: {decision.lines()}"
            if not said.why or "\n" in said.why:
                yield f"no reason in one line: {decision.lines()}"


def turns(decisions: list[tuple[int, Decision]], policy: AutoscaleSettings) -> list[str]:
    """Where a stage turned twice within a cooldown. What leaves zero is no second turn: what waits there cannot wait for a cooldown."""
    wrong = []
    for name in STAGES:
        direction, turned_ms = 0, -math.inf
        for now_ms, decision in decisions:
            said = decision.stage(name)
            if not said.is_change:
                continue
            goes = 1 if said.desired > said.before else -1
            if goes == -direction:
                if now_ms - turned_ms < policy.cooldown_s * 1000 and said.before > 0:
                    wrong.append(
                        f"{now_ms / 1000:g} s: {name} turned twice within {policy.cooldown_s:g} s: {decision.lines()}"
                    )
                turned_ms = now_ms
            direction = goes
    return wrong


def crowded(signals: PoolSignals, name: str, chance: random.Random) -> PoolSignals:
    """The same with more in the queue of a stage."""
    stage = signals.stage(name)
    tasks, tokens = chance.choice((1, 10, 1000)), chance.choice((0, 100, 1_000_000))
    lanes = {lane: _crowd(said, tasks, tokens) for lane, said in stage.lanes.items()}
    return dataclasses.replace(signals, **{name: dataclasses.replace(stage, lanes=lanes)})


def _crowd(said: LaneSignals, tasks: int, tokens: int) -> LaneSignals:
    if said.waiting is None or said.prompt_tokens is None:
        return said
    oldest_s = 0.0 if said.oldest_s is None else said.oldest_s
    return dataclasses.replace(
        said, waiting=said.waiting + tasks, prompt_tokens=said.prompt_tokens + tokens, oldest_s=oldest_s
    )


def broken(signals: PoolSignals, chance: random.Random) -> PoolSignals:
    """The same with one value missing, or such as it cannot be."""
    where = chance.choice(("pool", "speeds", "stage", "lane"))
    value = chance.choice(ABSURD)
    if where == "pool":
        return dataclasses.replace(
            signals, **{chance.choice(("clock_ms", "local_prompt_tokens_per_s", "local_prompt_tokens")): value}
        )
    if where == "speeds":
        return dataclasses.replace(
            signals, speeds=dataclasses.replace(signals.speeds, **{_field(Speeds, chance): value})
        )
    name = chance.choice(STAGES)
    stage = signals.stage(name)
    if where == "stage":
        fields = [field.name for field in dataclasses.fields(StageSignals) if field.name != "lanes"]
        return dataclasses.replace(signals, **{name: dataclasses.replace(stage, **{chance.choice(fields): value})})
    lanes = {
        lane: dataclasses.replace(said, **{_field(LaneSignals, chance): value}) for lane, said in stage.lanes.items()
    }
    return dataclasses.replace(signals, **{name: dataclasses.replace(stage, lanes=lanes)})


def _field(kind: type, chance: random.Random) -> str:
    return chance.choice([field.name for field in dataclasses.fields(kind)])


def _replaced(policy: AutoscaleSettings, **changes: int) -> AutoscaleSettings:
    return AutoscaleSettings(**{name: getattr(policy, name) for name in policy.__struct_fields__} | changes)


def all_violations(seeds: range, processes: int = 1) -> list[str]:
    """What is wrong in the runs of all these seeds."""
    if processes == 1:
        return [wrong for seed in seeds for wrong in violations(seed)]
    with multiprocessing.Pool(processes) as pool:
        return [
            wrong
            for found in pool.imap_unordered(functools.partial(violations), seeds, chunksize=10)
            for wrong in found
        ]
