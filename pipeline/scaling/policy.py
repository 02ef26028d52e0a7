"""`decide`: how many workers each stage of a pool should have. A pure function; its memory is a value that goes in and comes out.

One look:
 1. Observe: arrivals are remembered, and when anything was last under way.
 2. Need: what comes (forecast to when a worker started now is ready) and what waits, turned to workers by measured speeds.
 3. Step: up after consecutive looks that ask for more, at once from zero; down to the most that a calm window needed; not against the
    last change within the cooldown. Workers under way count: while some start, only what comes can ask for more, not what piles up.
 4. Fit: bounds, then the GPUs that both stages share.
What cannot be believed holds: a stage with a missing or absurd signal stays as it is, but for the first worker of one that has none.
"""

from __future__ import annotations

import collections
import dataclasses

from pipeline.config import AutoscaleSettings, StageScaling
from pipeline.errors import ConfigError
from pipeline.queue import STAGES
from pipeline.scaling.budget import gpus, shares
from pipeline.scaling.demand import Need, decode_need, prefill_need
from pipeline.scaling.forecast import BUCKET_S, Bucket, expect, remember
from pipeline.scaling.memory import Memory, StageMemory
from pipeline.scaling.signals import PoolSignals, StageSignals, believed, doubt, number

AHEAD_MS = 2000  # clocks differ by less
STARTS = 2  # as many times as long as a start takes, workers that were asked for are waited for
GAP_LOOKS = 3  # that may be missing before a calm is none any more
NEEDS = {"prefill": prefill_need, "decode": decode_need}


@dataclasses.dataclass(frozen=True, slots=True)
class StageDecision:
    """What one stage should have from now on, and why, in one line. None: it is not known what there is, so it stays."""

    before: int | None
    desired: int | None
    why: str

    @property
    def is_change(self) -> bool:
        """Whether it is another number than before."""
        return self.desired != self.before


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """Workers of both stages, and the memory that the next look takes."""

    prefill: StageDecision
    decode: StageDecision
    memory: Memory

    def stage(self, name: str) -> StageDecision:
        """The decision for a stage by its name."""
        return self.prefill if name == "prefill" else self.decode

    def lines(self) -> list[str]:
        """One line a stage: "prefill 2 -> 4: 18,400 prompt tokens wait 3.1 s, promised 1.0 s"."""
        return [_line(name, self.stage(name)) for name in STAGES]


@dataclasses.dataclass(frozen=True, slots=True)
class _Look:
    """One stage as one look finds it. `before`: workers that it should have had until now."""

    name: str
    before: int
    signals: PoolSignals
    policy: AutoscaleSettings
    memory: Memory
    now_ms: int

    @property
    def stage(self) -> StageSignals:
        return self.signals.stage(self.name)

    @property
    def bounds(self) -> StageScaling:
        return self.policy.stage(self.name)

    def within(self, since_ms: int | None, seconds: float) -> bool:
        """Whether something was less than so many seconds ago."""
        return _is_within(since_ms, seconds, self.now_ms)


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A stage after a look: what it had, what it should get, and what it needs, by which the GPUs are shared."""

    before: int
    desired: int
    need: int
    why: str
    memory: StageMemory
    is_held: bool = False


def check(policy: AutoscaleSettings) -> None:
    """Raises ConfigError where the settings contradict each other."""
    for name in STAGES:
        bounds = policy.stage(name)
        if bounds.min_workers > bounds.max_workers:
            raise ConfigError(
                f"autoscale.{name}.min_workers: {bounds.min_workers} is more than max_workers, {bounds.max_workers}"
            )
    for device, count in collections.Counter(policy.device_names).items():
        if count > 1:
            raise ConfigError(f"autoscale.devices: {device} is named {count} times")
    decode = max(policy.decode.min_workers, min(1, policy.decode.max_workers))
    least = gpus({"prefill": policy.prefill.min_workers, "decode": decode}, policy)
    if policy.gpu_budget and least > policy.gpu_budget:
        raise ConfigError(
            f"autoscale.gpu_budget: {policy.gpu_budget} are fewer than the {least} of min_workers and a decode worker"
        )


def decide(signals: PoolSignals, policy: AutoscaleSettings, memory: Memory, now_ms: int) -> Decision:
    """Workers of both stages from now on. `policy` has passed `check`; `memory` is that of the decision before."""
    untimely = _is_not_of_now(signals, policy, memory, now_ms)
    before = {name: _before(name, signals, policy, memory) for name in STAGES}
    if None in before.values() or (untimely and None in (memory.prefill.desired, memory.decode.desired)):
        unknown = StageDecision(None, None, untimely or "it is not known how many there are")
        return Decision(unknown, unknown, memory)
    if not untimely:
        memory = _observed(signals, policy, memory, now_ms)
    elif memory.seen_ms is not None and memory.seen_ms > now_ms:
        memory = _without_times(memory)
    looks = [_Look(name, count or 0, signals, policy, memory, now_ms) for name, count in before.items()]
    if untimely:
        return _decision({look.name: _hold(look, untimely) for look in looks}, memory)
    return _decision(_fit({look.name: _step(look) for look in looks}, policy, now_ms), memory)


# -- observe


def _is_not_of_now(signals: PoolSignals, policy: AutoscaleSettings, memory: Memory, now_ms: int) -> str:
    clock_ms = signals.clock_ms
    if clock_ms is None or not believed(clock_ms):
        return "the signals do not say when they were read"
    if clock_ms > now_ms + AHEAD_MS:
        return f"the signals are from {(clock_ms - now_ms) / 1000:.1f} s in the future"
    if now_ms - clock_ms > policy.stale_s * 1000:
        return f"the signals are {(now_ms - clock_ms) / 1000:.1f} s old"
    if memory.seen_ms is not None and memory.seen_ms > now_ms:
        return "the clock went back"
    return ""


def _before(name: str, signals: PoolSignals, policy: AutoscaleSettings, memory: Memory) -> int | None:
    """Workers that a stage should have had until now; at first those that there are. None: that is not known."""
    there, said = memory.stage(name).desired, signals.stage(name)
    if there is None:
        if not (believed(said.alive) and believed(said.starting)):
            return None
        there = int(number(said.alive) + number(said.starting))
    return min(max(there, policy.stage(name).min_workers), policy.stage(name).max_workers)


def _without_times(memory: Memory) -> Memory:
    """A memory whose times are worth nothing: the numbers of workers are all that is left of it."""
    return Memory(prefill=StageMemory(memory.prefill.desired), decode=StageMemory(memory.decode.desired))


def _observed(signals: PoolSignals, policy: AutoscaleSettings, memory: Memory, now_ms: int) -> Memory:
    """The memory with this reading. After a gap no calm is certain, and the rates are taken for those of the last seconds."""
    since_ms = memory.seen_ms
    if since_ms is None or now_ms - since_ms > max(policy.stale_s, GAP_LOOKS * policy.poll_s) * 1000:
        since_ms = now_ms - int(BUCKET_S * 1000)
        memory = dataclasses.replace(
            memory, busy_ms=now_ms, prefill=memory.prefill.interrupted(), decode=memory.decode.interrupted()
        )
    arrivals = memory.arrivals
    if now_ms > since_ms and not doubt(signals):
        span_s = (now_ms - since_ms) / 1000
        came = Bucket(since_ms, now_ms, signals.requests_per_s * span_s, signals.prompt_tokens_per_s * span_s)
        arrivals = remember(arrivals, came)
    is_idle = signals.prefill.is_empty and signals.decode.is_empty
    return dataclasses.replace(memory, seen_ms=now_ms, busy_ms=memory.busy_ms if is_idle else now_ms, arrivals=arrivals)


# -- step


def _step(look: _Look) -> _Step:
    is_asleep = not look.within(look.memory.busy_ms, look.policy.idle_s)
    why = doubt(look.signals, look.name, is_asleep=is_asleep) or doubt(look.signals)
    if look.before == 0 and _is_called(look):
        return _wake(look, Need(1, 1, "its first task waits") if why else _need(look))
    if why:
        return _hold(look, why)
    if look.before == 0:
        return _Step(0, 0, 0, "nothing waits for it", _looked(look, 0))
    if is_asleep:
        need = Need(0, 0, f"nothing came, waited or ran for {look.policy.idle_s:g} s")
        stage = _looked(look, look.bounds.min_workers)
        return _down(look, look.bounds.min_workers, need, stage)
    need = _need(look)
    wanted = need.workers
    if _is_in_flight(look):  # what piles up behind a step is no news
        wanted = max(need.flow, min(wanted, look.before))
    wanted = min(max(wanted, look.bounds.min_workers, 1), look.bounds.max_workers)
    stage = _looked(look, wanted)
    if wanted > look.before:
        return _up(look, wanted, need, stage)
    return _down(look, max(count for _, count in stage.needs), need, stage)


def _is_in_flight(look: _Look) -> bool:
    """Whether workers that were asked for are still to come. Those of which nothing is seen for two starts will not."""
    if number(look.stage.alive) >= look.before:
        return False
    since_ms = look.memory.stage(look.name).changed_ms
    return bool(number(look.stage.starting)) or look.within(since_ms, STARTS * _start_s(look))


def _start_s(look: _Look) -> float:
    return number(look.stage.start_s) if believed(look.stage.start_s) else look.policy.start_s


def _need(look: _Look) -> Need:
    start_s = _start_s(look)
    outlook = expect(look.memory.arrivals, look.now_ms, start_s + look.policy.poll_s)
    return NEEDS[look.name](look.signals, outlook, look.policy, start_s)


def _is_called(look: _Look) -> bool:
    """Whether something waits for the first worker of a stage. What waits for prefill will want decode right behind it."""
    signals = look.signals
    is_local = number(signals.local_prompt_tokens) > 0 or number(signals.local_prompt_tokens_per_s) > 0
    return signals.prefill.is_called or is_local or (look.name == "decode" and signals.decode.is_called)


def _looked(look: _Look, need: int) -> StageMemory:
    stage = dataclasses.replace(look.memory.stage(look.name), desired=look.before)
    return stage.looked(need, look.now_ms, look.policy.down_after_s * 1000)


def _wake(look: _Look, need: Need) -> _Step:
    wanted = min(max(need.workers, 1), look.bounds.max_workers)
    return _Step(0, wanted, wanted, need.why, _looked(look, wanted))


def _up(look: _Look, wanted: int, need: Need, stage: StageMemory) -> _Step:
    stage = dataclasses.replace(stage, breaches=stage.breaches + 1)
    if stage.breaches < look.policy.up_after:
        why = f"{wanted} asked for {stage.breaches} of {look.policy.up_after} times: {need.why}"
        return _Step(look.before, look.before, wanted, why, stage)
    if stage.direction < 0 and look.within(stage.turned_ms, look.policy.cooldown_s):
        return _Step(
            look.before, look.before, wanted, f"{wanted} in the cooldown of the last change: {need.why}", stage
        )
    return _Step(look.before, wanted, wanted, need.why, stage)


def _down(look: _Look, calm: int, need: Need, stage: StageMemory) -> _Step:
    """To `calm` workers, where those are fewer, and it is calm."""
    before, stage = look.before, dataclasses.replace(stage, breaches=0)
    if calm >= before:
        return _Step(before, before, before, need.why, stage)
    is_new = calm > 0 and look.within(stage.calm_since_ms, look.policy.down_after_s)
    if is_new or _keeps(stage, look.policy, look.now_ms):
        return _Step(before, before, before, f"{calm} are enough, not for long yet: {need.why}", stage)
    if number(look.stage.draining):
        return _Step(before, before, before, f"{calm} are enough, but workers still drain: {need.why}", stage)
    return _Step(before, calm, calm, need.why, stage)


def _hold(look: _Look, why: str) -> _Step:
    stage = look.memory.stage(look.name).interrupted()
    return _Step(look.before, look.before, look.before, f"held, {why}", stage, is_held=True)


# -- fit


def _fit(steps: dict[str, _Step], policy: AutoscaleSettings, now_ms: int) -> dict[str, _Step]:
    """The steps within the GPUs that there are. Who has more than its share gives, unless it is held or may not turn down yet."""
    desired = {name: step.desired for name, step in steps.items()}
    if not policy.gpu_budget or gpus(desired, policy) <= policy.gpu_budget:
        return steps
    fair = shares({name: max(step.desired, step.need) for name, step in steps.items()}, policy)
    given = {name: min(desired[name], fair[name]) for name in STAGES}
    kept = {
        name: min(step.before, step.desired)
        for name, step in steps.items()
        if given[name] < step.before and (step.is_held or _keeps(step.memory, policy, now_ms))
    }
    if kept and gpus(kept, policy) <= policy.gpu_budget:  # else the settings have changed: there is no other way
        left = policy.gpu_budget - gpus(kept, policy)
        rest = {name: _at_most(desired[name], left, policy.stage(name).gpus) for name in STAGES if name not in kept}
        given = {**kept, **rest}
    return {name: _capped(steps[name], given[name], policy) for name in STAGES}


def _keeps(stage: StageMemory, policy: AutoscaleSettings, now_ms: int) -> bool:
    """Whether a stage may not be made smaller: it grew, or turned, within the cooldown."""
    return _is_within(stage.changed_ms if stage.direction > 0 else stage.turned_ms, policy.cooldown_s, now_ms)


def _at_most(workers: int, free: int, each: int) -> int:
    return min(workers, free // each) if each else workers


def _capped(step: _Step, desired: int, policy: AutoscaleSettings) -> _Step:
    if desired == step.desired:
        return step
    why = f"{step.desired} do not fit {policy.gpu_budget} GPUs: {step.why}"
    return dataclasses.replace(step, desired=desired, why=why)


def _is_within(since_ms: int | None, seconds: float, now_ms: int) -> bool:
    return since_ms is not None and now_ms - since_ms < seconds * 1000


# -- say


def _decision(steps: dict[str, _Step], memory: Memory) -> Decision:
    now_ms = memory.seen_ms or 0
    stages = {}
    for name, step in steps.items():
        remembered = dataclasses.replace(step.memory, desired=step.before)
        stages[name] = remembered.changed(step.desired, now_ms) if step.desired != step.before else remembered
    said = {name: StageDecision(step.before, step.desired, step.why) for name, step in steps.items()}
    memory = dataclasses.replace(memory, prefill=stages["prefill"], decode=stages["decode"])
    return Decision(said["prefill"], said["decode"], memory)


def _line(name: str, decision: StageDecision) -> str:
    if decision.desired is None:
        return f"{name} stays as it is: {decision.why}"
    if decision.is_change:
        return f"{name} {decision.before} -> {decision.desired}: {decision.why}"
    return f"{name} stays at {decision.desired}: {decision.why}"


__all__ = ["Decision", "StageDecision", "check", "decide"]
