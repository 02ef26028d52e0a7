"""A pool of simulated workers that follows a rule: measured speeds and start-up times, no code of Baton's.

A prefill worker computes one prompt after the other, in the order of their arrival. A decode worker runs sequences side by side; the more,
the longer is its step: `step_s + sequence_s * running`. All that wait for decode are taken in order, by the worker that runs least.
A worker is paid from its start, which takes a while, to its end; one that is told to go finishes what it has. While no prefill worker is
alive, decode workers compute prompts themselves, as Baton's do.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections import deque
from typing import Protocol

from pipeline.scaling.signals import LaneSignals, PoolSignals, Speeds, StageSignals
from tests.scaling.traces import ANSWER_TOKENS, PROMPT_TOKENS, Trace


@dataclasses.dataclass(frozen=True, slots=True)
class Machines:
    """What workers can do, and what is promised."""

    prompt_token_s: float = 0.0005
    step_s: float = 0.02
    sequence_s: float = 0.00125
    max_sequences: int = 32
    blocks: int = 4096
    block_size: int = 16
    start_s: float = 30.0
    start_spread: float = 0.2
    context_tokens: int = 8192
    ttft_s: float = 2.0
    itl_s: float = 0.05

    @property
    def seats(self) -> int:
        """Sequences of a decode worker that keep the inter-token promise."""
        return int((self.itl_s - self.step_s) / self.sequence_s + 1e-9)


class Rule(Protocol):
    """Decides, each `every_s`, how many workers there should be: (prefill, decode)."""

    every_s: float
    initial: tuple[int, int]

    def desired(self, signals: PoolSignals, now_ms: int) -> tuple[int | None, int | None]: ...


@dataclasses.dataclass(slots=True)
class Worker:
    name: int
    started_s: float
    ready_s: float
    is_alive: bool = False
    is_leaving: bool = False
    gone_s: float | None = None
    running: int = 0
    blocks: int = 0
    progress: float = 0.0  # decode: tokens that each of its sequences has got since it began
    seen_s: float = 0.0
    version: int = 0
    marks: list[tuple[float, int, bool]] = dataclasses.field(
        default_factory=list
    )  # (progress, request, is first token)


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of a trace under a rule."""

    requests: int = 0
    in_slo: int = 0
    late_ttft: int = 0
    late_itl: int = 0
    worker_s: float = 0.0

    def add(self, other: Outcome) -> None:
        self.requests += other.requests
        self.in_slo += other.in_slo
        self.late_ttft += other.late_ttft
        self.late_itl += other.late_itl
        self.worker_s += other.worker_s


class Simulation:
    """One trace under one rule."""

    def __init__(self, trace: Trace, rule: Rule, machines: Machines, longest_s: float = math.inf) -> None:
        self.trace, self.rule, self.machines, self.longest_s = trace, rule, machines, longest_s
        self.chance = random.Random(trace.seed)
        self.now_s = 0.0
        self.names = itertools.count()
        self.fleets: dict[str, list[Worker]] = {"prefill": [], "decode": []}
        self.waiting: dict[str, deque[int]] = {"prefill": deque(), "decode": deque()}
        self.waiting_tokens = 0
        self.events: list[tuple[float, int, str, Worker, int]] = []
        self.order = itertools.count()
        self.first_s: dict[int, float] = {}
        self.is_local: set[int] = set()
        self.counts = dict.fromkeys(("prefill", "direct", "tokens", "local", "prefilled", "done"), 0)
        self.outcome = Outcome()
        self.has_measured = False

    def run(self) -> Outcome:
        """All arrivals, decisions and what follows of them, until the last request has ended, or `longest_s` is over."""
        for name, count in zip(self.fleets, self.rule.initial, strict=True):
            for _ in range(count):
                self._start(name, ready_s=0.0)
        next_look_s, last_look_s = self.rule.every_s, 0.0
        arrivals, at = self.trace.arrivals, 0
        while True:
            arrival_s = arrivals[at].at_s if at < len(arrivals) else math.inf
            event_s = self.events[0][0] if self.events else math.inf
            is_over = at == len(arrivals) and self.outcome.requests == len(arrivals)
            if (is_over and next_look_s > self.trace.length_s) or self.now_s > self.longest_s:
                break
            if next_look_s <= min(arrival_s, event_s):
                self.now_s = next_look_s
                self._look(last_look_s)
                last_look_s, next_look_s = next_look_s, next_look_s + self.rule.every_s
            elif arrival_s <= event_s:
                self.now_s = arrival_s
                self._arrive(at)
                at += 1
            else:
                self._happen()
        end_s = max(self.trace.length_s, self.now_s)
        for worker in itertools.chain(*self.fleets.values()):
            self.outcome.worker_s += end_s - worker.started_s
        return self.outcome

    # -- requests

    def _arrive(self, request: int) -> None:
        if self._alive("prefill") or not self._alive("decode"):
            self.counts["prefill"] += 1
            self.counts["tokens"] += self.trace.arrivals[request].prompt_tokens
            self.waiting["prefill"].append(request)
            self.waiting_tokens += self.trace.arrivals[request].prompt_tokens
            self._prefill()
        else:
            self.counts["direct"] += 1
            self._decode_locally(request)

    def _decode_locally(self, request: int) -> None:
        self.is_local.add(request)
        self.counts["local"] += self.trace.arrivals[request].prompt_tokens
        self._hand_over(request)

    def _hand_over(self, request: int) -> None:
        self.waiting["decode"].append(request)
        self._decode()

    def _prefill(self) -> None:
        queue = self.waiting["prefill"]
        for worker in self.fleets["prefill"]:
            if not queue:
                return
            if worker.is_alive and not worker.is_leaving and not worker.running:
                request = queue.popleft()
                tokens = self.trace.arrivals[request].prompt_tokens
                self.waiting_tokens -= tokens
                worker.running = 1
                self._at(self.now_s + tokens * self.machines.prompt_token_s, "prefilled", worker, request)

    def _decode(self) -> None:
        queue = self.waiting["decode"]
        while queue:
            blocks = self._blocks(queue[0])
            room = self.machines.blocks - blocks
            free = [
                worker
                for worker in self.fleets["decode"]
                if worker.is_alive
                and not worker.is_leaving
                and worker.running < self.machines.max_sequences
                and worker.blocks <= room
            ]
            if not free:
                return
            self._join(min(free, key=lambda worker: worker.running), queue.popleft(), blocks)

    def _join(self, worker: Worker, request: int, blocks: int) -> None:
        self._progress(worker)
        tokens, begins = self.trace.arrivals[request].answer_tokens - 1, worker.progress
        if request in self.is_local:  # in parts, beside the others
            prompt_s = self.trace.arrivals[request].prompt_tokens * self.machines.prompt_token_s
            begins += prompt_s / self.machines.step_s
            heapq.heappush(worker.marks, (begins, request, True))
        heapq.heappush(worker.marks, (begins + tokens, request, False))
        worker.running += 1
        worker.blocks += blocks
        self._plan(worker)

    def _progress(self, worker: Worker) -> None:
        if worker.running:
            worker.progress += (self.now_s - worker.seen_s) / self._step_s(worker)
        worker.seen_s = self.now_s

    def _plan(self, worker: Worker) -> None:
        worker.version += 1
        if worker.marks:
            left = max(0.0, worker.marks[0][0] - worker.progress)
            self._at(self.now_s + left * self._step_s(worker), "marked", worker, worker.version)

    def _step_s(self, worker: Worker) -> float:
        return self.machines.step_s + self.machines.sequence_s * worker.running

    def _blocks(self, request: int) -> int:
        arrival = self.trace.arrivals[request]
        return (arrival.prompt_tokens + arrival.answer_tokens) // self.machines.block_size + 1

    # -- events

    def _at(self, at_s: float, kind: str, worker: Worker, value: int) -> None:
        heapq.heappush(self.events, (at_s, next(self.order), kind, worker, value))

    def _happen(self) -> None:
        at_s, _, kind, worker, value = heapq.heappop(self.events)
        if kind == "marked" and value != worker.version:
            return
        self.now_s = at_s
        if kind == "ready":
            self._ready(worker, "prefill" if value == 0 else "decode")
        elif kind == "prefilled":
            worker.running = 0
            self.counts["prefilled"] += 1
            self.first_s[value] = at_s
            self._leave_if_told(worker, "prefill")
            self._hand_over(value)
            self._prefill()
        else:
            self._mark(worker)

    def _mark(self, worker: Worker) -> None:
        self._progress(worker)
        while worker.marks and worker.marks[0][0] <= worker.progress + 1e-6:
            _, request, is_first = heapq.heappop(worker.marks)
            if is_first:
                self.first_s[request] = self.now_s
                continue
            worker.running -= 1
            worker.blocks -= self._blocks(request)
            self._judge(request)
        self._leave_if_told(worker, "decode")
        self._plan(worker)
        self._decode()

    def _judge(self, request: int) -> None:
        arrival, outcome = self.trace.arrivals[request], self.outcome
        first_s = self.first_s.pop(request)
        is_late = first_s - arrival.at_s > self.machines.ttft_s
        is_slow = self.now_s - first_s > self.machines.itl_s * (arrival.answer_tokens - 1) + 1e-6
        outcome.requests += 1
        outcome.late_ttft += is_late
        outcome.late_itl += is_slow
        outcome.in_slo += not (is_late or is_slow)
        self.counts["done"] += 1
        self.has_measured = True

    # -- workers

    def _ready(self, worker: Worker, stage: str) -> None:
        if worker.gone_s is not None:
            return
        worker.is_alive = True
        worker.seen_s = self.now_s
        if stage == "prefill":
            self._prefill()
            return
        if not self._alive("prefill"):
            moved, self.waiting["prefill"] = self.waiting["prefill"], deque()
            self.waiting_tokens = 0
            for request in moved:
                self._decode_locally(request)
        self._decode()

    def _alive(self, stage: str) -> list[Worker]:
        return [worker for worker in self.fleets[stage] if worker.is_alive and not worker.is_leaving]

    def _start(self, stage: str, ready_s: float | None = None) -> None:
        if ready_s is None:
            spread = self.machines.start_spread
            ready_s = self.now_s + self.machines.start_s * self.chance.uniform(1 - spread, 1 + spread)
        worker = Worker(next(self.names), self.now_s, ready_s)
        self.fleets[stage].append(worker)
        if ready_s <= self.now_s:
            worker.is_alive = True
        else:
            self._at(ready_s, "ready", worker, 0 if stage == "prefill" else 1)

    def _stop(self, stage: str, count: int) -> None:
        """Those that start go first, then those with least work."""
        staying = [worker for worker in self.fleets[stage] if not worker.is_leaving]
        staying.sort(key=lambda worker: (worker.is_alive, worker.running, -worker.name))
        for worker in staying[:count]:
            worker.is_leaving = True
            self._leave_if_told(worker, stage)

    def _leave_if_told(self, worker: Worker, stage: str) -> None:
        if worker.is_leaving and not worker.running and worker.gone_s is None:
            worker.gone_s = self.now_s
            self.outcome.worker_s += self.now_s - worker.started_s
            self.fleets[stage].remove(worker)

    # -- the rule

    def _look(self, last_look_s: float) -> None:
        signals = self.signals(self.now_s - last_look_s)
        desired = dict(zip(self.fleets, self.rule.desired(signals, round(self.now_s * 1000)), strict=True))
        for stage, count in desired.items():
            if count is None:
                continue
            there = sum(not worker.is_leaving for worker in self.fleets[stage])
            for _ in range(count - there):
                self._start(stage)
            self._stop(stage, max(0, there - count))
        self.counts = dict.fromkeys(self.counts, 0)

    def signals(self, seconds: float) -> PoolSignals:
        """What a reader would say of this pool, `seconds` after the reading before."""
        per_s = {name: count / seconds for name, count in self.counts.items()}
        machines = self.machines
        running = sum(worker.running for worker in self.fleets["decode"])
        steps_s = sum(worker.running * self._step_s(worker) for worker in self.fleets["decode"])
        speeds = Speeds(
            prompt_token_s=machines.prompt_token_s, inter_token_s=steps_s / running if running else 0.0, answer_tokens=ANSWER_TOKENS,
            blocks_per_sequence=(PROMPT_TOKENS + ANSWER_TOKENS) / machines.block_size, sequences_per_worker=machines.seats,
        )  # fmt: skip
        local = sum(
            self.trace.arrivals[request].prompt_tokens for request in self.waiting["decode"] if request in self.is_local
        )
        return PoolSignals(
            clock_ms=round(self.now_s * 1000),
            local_prompt_tokens_per_s=per_s["local"],
            local_prompt_tokens=local,
            prefill=self._stage("prefill", self.waiting_tokens, per_s["prefill"], per_s["tokens"], per_s["prefilled"]),
            decode=self._stage("decode", 0, per_s["direct"], per_s["local"], per_s["done"]),
            speeds=speeds if self.has_measured else Speeds(),
        )

    def _stage(self, name: str, tokens: int, arrivals: float, arriving_tokens: float, served: float) -> StageSignals:
        queue, fleet = self.waiting[name], self.fleets[name]
        oldest_s = self.now_s - self.trace.arrivals[queue[0]].at_s if queue else 0.0
        alive = self._alive(name)
        return StageSignals(
            lanes={"default": LaneSignals(len(queue), tokens, oldest_s, arrivals, arriving_tokens)},
            served_per_s=served,
            running=sum(worker.running for worker in fleet),
            blocks_used=sum(worker.blocks for worker in alive), blocks_total=len(alive) * self.machines.blocks,
            alive=len(alive),
            starting=sum(not worker.is_alive and not worker.is_leaving for worker in fleet),
            draining=sum(worker.is_leaving for worker in fleet),
            start_s=self.machines.start_s,
        )  # fmt: skip
