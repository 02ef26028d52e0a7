"""The rules that are compared: Baton's, fixed provisioning, and what Celery, KEDA and Dynamo do, by what their sources say."""

from __future__ import annotations

import math
from collections import deque

from pipeline.config import AutoscaleSettings
from pipeline.scaling.memory import Memory
from pipeline.scaling.policy import Decision, decide
from pipeline.scaling.signals import PoolSignals, StageSignals, number
from tests.scaling.simulator import Machines
from tests.scaling.traces import ANSWER_TOKENS, PROMPT_TOKENS, Trace

MOST = 16  # workers of a stage, for each rule
STAGES = ("prefill", "decode")
DYNAMO = {
    "throughput": {"prefill": (1.0, 0.1), "decode": (1.0, 0.6)},
    "latency": {"prefill": (0.1, 0.0), "decode": (0.4, 0.1)},
}  # up at, down below


class Baton:
    """`decide`, each 5 s."""

    every_s = 5.0
    initial = (1, 1)

    def __init__(self, policy: AutoscaleSettings) -> None:
        self.policy = policy
        self.memory = Memory()
        self.decisions: list[tuple[int, Decision]] = []

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int | None, int | None]:
        decision = decide(signals, self.policy, self.memory, now_ms)
        self.memory = decision.memory
        self.decisions.append((now_ms, decision))
        return decision.prefill.desired, decision.decode.desired


class Fixed:
    """As many as the peak of the trace takes, which is known beforehand, at the usual utilization of 70 %."""

    every_s = 3600.0

    def __init__(self, trace: Trace, machines: Machines) -> None:
        prefill = trace.peak_per_s * PROMPT_TOKENS * machines.prompt_token_s / 0.7
        decode = trace.peak_per_s * ANSWER_TOKENS * machines.itl_s / machines.seats / 0.7
        self.initial = (math.ceil(prefill), math.ceil(decode))

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int, int]:
        return self.initial


class Celery:
    """`--autoscale=MOST,1` (celery/worker/autoscale.py): at once as many processes as there are reserved tasks; fewer once the last growth
    is `AUTOSCALE_KEEPALIVE` ago. A process is a prefill worker, or the seats of a decode worker."""

    every_s = 1.0
    initial = (1, 1)

    def __init__(self, machines: Machines, keepalive_s: float = 30.0) -> None:
        self.per_worker = {"prefill": 1, "decode": machines.seats}
        self.keepalive_ms = keepalive_s * 1000
        self.processes = {"prefill": 1, "decode": 1}
        self.grown_ms = {"prefill": 0, "decode": 0}

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int, int]:
        for name in STAGES:
            reserved = _length(signals.stage(name)) / self.per_worker[name]
            wanted = min(MOST, max(1, math.ceil(reserved)))
            if wanted > self.processes[name]:
                self.processes[name], self.grown_ms[name] = wanted, now_ms
            elif wanted < self.processes[name] and now_ms - self.grown_ms[name] > self.keepalive_ms:
                self.processes[name] = wanted
        return self.processes["prefill"], self.processes["decode"]


class Keda:
    """The redis-streams scaler on the length of the stream (waiting and in flight): 0 and 1 by KEDA, the rest by HPA. 15 s between looks,
    10 % tolerance, up by 4 or to the double, down to the most of 300 s, to zero after 300 s; from zero at a look each 30 s."""

    every_s = 15.0
    initial = (1, 1)

    def __init__(self, prefill: float, decode: float) -> None:
        self.target = {"prefill": prefill, "decode": decode}
        self.replicas = {"prefill": 1, "decode": 1}
        self.active_ms = {"prefill": 0, "decode": 0}
        self.recent: dict[str, deque[tuple[int, int]]] = {"prefill": deque(), "decode": deque()}

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int, int]:
        for name in STAGES:
            self.replicas[name] = self._stage(name, _length(signals.stage(name)), now_ms)
        return self.replicas["prefill"], self.replicas["decode"]

    def _stage(self, name: str, length: float, now_ms: int) -> int:
        now, recent = self.replicas[name], self.recent[name]
        if length > 0:
            self.active_ms[name] = now_ms
        elif now_ms - self.active_ms[name] >= 300_000:
            recent.clear()
            return 0
        if now == 0:
            return 1 if length > 0 and now_ms % 30_000 == 0 else 0
        ratio = length / self.target[name] / now
        wanted = now if abs(ratio - 1) <= 0.1 else math.ceil(length / self.target[name])
        wanted = min(MOST, max(1, min(wanted, max(now + 4, now * 2))))
        recent.append((now_ms, wanted))
        while recent[0][0] <= now_ms - 300_000:
            recent.popleft()
        return wanted if wanted >= now else min(now, max(count for _, count in recent))


class Dynamo:
    """The planner's load loop (1.6.1): one worker at a time, nothing while one is on its way, one at least. Prefill by queued tokens a
    worker, in contexts; decode by the share of KV blocks of what runs and waits. Down only where the rest would not be asked for more."""

    every_s = 5.0
    initial = (1, 1)

    def __init__(self, machines: Machines, target: str) -> None:
        self.machines = machines
        self.bounds = DYNAMO[target]
        self.replicas = {"prefill": 1, "decode": 1}

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int, int]:
        for name in STAGES:
            said = signals.stage(name)
            alive = number(said.alive)
            if alive and not said.starting and not said.draining:
                self._step(name, self._load(name, signals) / alive)
        return self.replicas["prefill"], self.replicas["decode"]

    def _load(self, name: str, signals: PoolSignals) -> float:
        if name == "prefill":
            return signals.prefill.promised("prompt_tokens") / self.machines.context_tokens
        per_sequence = (PROMPT_TOKENS + ANSWER_TOKENS) / self.machines.block_size
        waiting = signals.decode.promised("waiting")
        return (number(signals.decode.blocks_used) + waiting * per_sequence) / self.machines.blocks

    def _step(self, name: str, load: float) -> None:
        (up, down), now = self.bounds[name], self.replicas[name]
        is_low = load < down or load == down == 0
        if load >= up:
            self.replicas[name] = min(MOST, now + 1)
        elif is_low and now > 1 and load * now / (now - 1) < up:
            self.replicas[name] = now - 1


def _length(stage: StageSignals) -> float:
    return stage.promised("waiting") + number(stage.running)
