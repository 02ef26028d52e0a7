"""The workers of one pool on this machine, as many as `decide` says: looks, decides, starts and drains, until it is told to stop.

One look:
 1. Read: the signals, and which workers Redis lists. One that was started here has started when it is listed.
 2. Decide; what was decided is a line, an event and a few numbers in Redis.
 3. Drain those who go, the ones with the least work; a GPU is free when its worker has ended.
 4. Start what is missing, as far as there are GPUs. A worker that ended by itself is started again, later each time.

Workers that somebody else started count as capacity and are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cli.children import Restarts
from pipeline.cli.gpus import Gpus
from pipeline.cli.worker_processes import Worker, WorkerPlace, WorkerProcesses
from pipeline.config import AutoscaleSettings
from pipeline.connection import Connection, Subscription
from pipeline.control import ControlClient
from pipeline.errors import BatonError, RedisUnavailable
from pipeline.keys import PoolKeys
from pipeline.processes import ending
from pipeline.queue import STAGES
from pipeline.scaling.lease import RENEW_S, ScalerLease
from pipeline.scaling.measured import Fleet, Known, signals_of
from pipeline.scaling.memory import Memory
from pipeline.scaling.places import (
    Candidate,
    Phase,
    Work,
    environment_of,
    first_free,
    next_step,
    who_goes,
    within_gpus,
)
from pipeline.scaling.policy import Decision, decide
from pipeline.scaling.reading import Reading, read
from pipeline.scaling.signals import PoolSignals
from pipeline.waiting import until_first, wait_at_most

Rule = Callable[[PoolSignals, AutoscaleSettings, Memory, int], Decision]

LEAST_PAUSE_S = 0.05  # between two looks, however often the bell rings
UNSEEN_LEASES = 4  # so long a worker of ours may be missing from Redis before it is taken for one that hangs
GAP_LOOKS = 3  # that were missed: then nothing is known of the time between


@dataclasses.dataclass(eq=False)
class Member:
    """One of the workers that were started here."""

    worker: Worker
    gpus: tuple[str, ...]
    restarts: Restarts
    phase: Phase = Phase.STARTING
    began_s: float = 0.0
    seen_s: float = 0.0  # when it was started, or Redis listed it last, or did not answer
    has_served: bool = False
    again_s: float = 0.0  # when a broken one is started again
    life: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None


class PoolSupervisor:
    """`take` first: a pool that another one has is told before anything starts. Then `run` until it is cancelled, then `drain`."""

    def __init__(
        self, pool: str, policy: AutoscaleSettings, connection: Connection, processes: WorkerProcesses,
        gpus: Gpus, say: Callable[[str], None], *, drain_s: float, lease_s: float, prefix: str = "",
        explain: bool = False, rule: Rule = decide,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.is_ready = asyncio.Event()  # as many workers serve as there are at least, or as GPUs allow
        self._policy = policy
        self._connection = connection
        self._processes = processes
        self._gpus = gpus
        self._say = say
        self._grace_s = drain_s + 5
        self._unseen_s = UNSEEN_LEASES * lease_s
        self._prefix = prefix
        self._explains = explain
        self._rule = rule
        self._keys = PoolKeys(pool)
        self._lease = ScalerLease(connection, pool)
        self._known = Known()
        self._memory = Memory()
        self._members: dict[str, dict[int, Member]] = {stage: {} for stage in STAGES}
        self._restarts: dict[tuple[str, int], Restarts] = {}
        self._start_s: dict[str, float] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._looked_s = time.monotonic()
        self._rung = asyncio.Event()
        self._asleep: set[str] = set()  # stages that nobody serves, and nobody is to
        self._lacking: set[str] = set()  # stages that wait for a GPU
        self._said: dict[str, str] = {}

    async def take(self) -> None:
        """Become the one who scales the pool; what workers of one that was killed held waits again. Raises PoolTaken."""
        await self._lease.take()
        self._keeping = asyncio.create_task(self._keep_lease())
        orphans = await self._lease.orphans()
        for name, stage in orphans.items():
            await self._processes.give_back(self.pool, stage, name)
            await self._lease.leave(name)

    async def run(self) -> None:
        """Look until cancelled. Raises PoolTaken when another one has the pool."""
        bells = await self._connection.subscribe(self._keys.bell("pool"))
        works = (self._kept(), self._hear(bells), self._look_on(bells))
        try:
            await until_first([asyncio.create_task(work) for work in works])
        finally:
            await bells.close()

    async def drain(self) -> None:
        """Let all workers go in order: prefill while decode can still fetch its blocks, then decode. Then others may have the pool."""
        for stage in STAGES:
            members = list(self._members[stage].values())
            for member in members:
                self._let_go(member)
            ends = [task for one in members for task in (one.ending, one.life) if task is not None]
            for failed in await asyncio.gather(*ends, return_exceptions=True):
                if failed is not None:
                    self._say(f"{self._prefix}{stage}: while its workers left: {failed!r}")
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        with contextlib.suppress(BatonError):
            await self._lease.give_up()

    def kill(self) -> None:
        """SIGKILL to all of them, for good."""
        for member in self._all():
            if member.worker.child.is_running:
                member.phase = Phase.LEAVING
                member.worker.child.kill()

    def phases(self) -> dict[str, list[Phase]]:
        """How far each of its workers is, by stage."""
        return {stage: self._phases(stage) for stage in STAGES}

    # -- when -------------------------------------------------------------------------------------------------------------

    async def _kept(self) -> None:
        """Raises PoolTaken when the pool is ours no more. That it stays ours does not end with this: all workers must have gone first."""
        assert self._keeping is not None
        await asyncio.shield(self._keeping)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(RedisUnavailable):
                await self._lease.take()

    async def _hear(self, bells: Subscription) -> None:
        async for _, _ in bells.messages():
            self._rung.set()

    async def _look_on(self, bells: Subscription) -> None:
        """Each `poll_s`, and at once when a worker came or left, or a task for a stage that has no worker of ours. While a stage has
        some, its bell is not listened to: it rings with every task."""
        while True:
            self._rung.clear()
            try:
                await self._look()
                await self._listen_for_the_first(bells)
            except RedisUnavailable as error:
                self._say_once("held", f"held: {error}")
                self._see_all()
            await asyncio.sleep(min(LEAST_PAUSE_S, self._policy.poll_s))
            await wait_at_most(self._rung, self._policy.poll_s)

    async def _listen_for_the_first(self, bells: Subscription) -> None:
        for stage in STAGES:
            bell = self._keys.bell(stage)
            is_asleep = stage in self._asleep
            if is_asleep and bell not in bells.channels:
                await bells.add(bell)
            elif not is_asleep and bell in bells.channels:
                await bells.remove(bell)

    # -- one look ---------------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        reading = await read(self._connection, self._keys)
        self._note_gap()
        others = self._take_note(reading)
        policy = within_gpus(self._policy, self._gpus.names, self._gpus_of_others(), others)
        fleet, itl_s = self._fleet(), policy.itl_ms / 1000
        signals, self._known = signals_of(reading, self._known, fleet, itl_s=itl_s)
        decision = self._rule(signals, policy, self._memory, reading.time_ms)
        await self._lease.tell(decision, reading.time_ms)
        self._memory = decision.memory
        self._tell(decision)
        for stage in STAGES:
            step = next_step(decision.stage(stage).desired, self._phases(stage), others[stage])
            await self._reduce(stage, step.let_go)
        for stage in STAGES:
            await self._start_again(stage)
            step = next_step(decision.stage(stage).desired, self._phases(stage), others[stage])
            await self._increase(stage, step.start)
            self._end_those_that_hang(stage)
        self._note_rest(decision, policy, others)

    def _gpus_of_others(self) -> int:
        count = self._gpus.of_others(self.pool)
        if count and count == len(self._gpus.names):
            self._say_once("GPUs", f"{self.pool}: others have all GPUs, it waits for one")
        else:
            self._said.pop("GPUs", None)
        return count

    def _note_gap(self) -> None:
        """A machine that was frozen, its workers with it, is no reason to end them."""
        if time.monotonic() - self._looked_s > max(GAP_LOOKS * self._policy.poll_s, self._unseen_s / UNSEEN_LEASES):
            self._see_all()
        self._looked_s = time.monotonic()

    def _note_rest(self, decision: Decision, policy: AutoscaleSettings, others: Mapping[str, int]) -> None:
        """Which stages nobody serves, or is to, and whether as many serve as there have to be, as far as there are GPUs."""
        desired = {stage: decision.stage(stage).desired for stage in STAGES}
        self._asleep = {stage for stage in STAGES if not (self._members[stage] or others[stage] or desired[stage])}
        if all(self._is_served(stage, desired[stage], policy, others) for stage in STAGES):
            self.is_ready.set()

    def _is_served(self, stage: str, desired: int | None, policy: AutoscaleSettings, others: Mapping[str, int]) -> bool:
        least, phases = policy.stage(stage).min_workers, self._phases(stage)
        if desired is not None:  # GPUs may not suffice for the minimum
            least = min(least, desired)
        lacks = stage in self._lacking and Phase.STARTING not in phases
        return lacks or others[stage] + phases.count(Phase.WORKING) >= least

    def _take_note(self, reading: Reading) -> dict[str, int]:
        """Which of ours have started, and how many others there are. Those of others that claim nothing are no capacity; ours keep their
        place."""
        others = {}
        for stage in STAGES:
            listed = dict(reading.stages[stage].workers)
            for member in self._members[stage].values():
                if listed.pop(member.worker.name, None) is None:
                    continue
                member.seen_s = time.monotonic()
                if member.phase is Phase.STARTING:
                    self._has_started(stage, member)
            others[stage] = sum(said.claims for said in listed.values())
        return others

    def _has_started(self, stage: str, member: Member) -> None:
        member.phase, member.has_served = Phase.WORKING, True
        took_s = time.monotonic() - member.began_s
        self._start_s[stage] = (self._start_s.get(stage, took_s) + took_s) / 2
        self._say(f"{member.worker.place.label} serves after {took_s:.1f} s")

    def _fleet(self) -> Fleet:
        """What only we know. Broken ones are not told: they are not available."""
        starting = {stage: self._phases(stage).count(Phase.STARTING) for stage in STAGES}
        draining = {
            stage: [one.worker.name for one in members.values() if one.phase is Phase.LEAVING]
            for stage, members in self._members.items()
        }
        return Fleet(starting, draining, self._start_s)

    def _phases(self, stage: str) -> list[Phase]:
        return [member.phase for member in self._members[stage].values()]

    def _tell(self, decision: Decision) -> None:
        for stage, line in zip(STAGES, decision.lines(), strict=True):
            if decision.stage(stage).is_change:
                self._say(f"{self._prefix}{line}")
            elif self._explains:
                self._say_once(stage, f"{self._prefix}{line}")

    def _say_once(self, about: str, line: str) -> None:
        """Not again before something else was said of it."""
        if self._said.get(about) != line:
            self._say(line)
        self._said[about] = line

    # -- fewer ------------------------------------------------------------------------------------------------------------

    async def _reduce(self, stage: str, count: int) -> None:
        if not count:
            return
        members = self._members[stage]
        for number in who_goes(await self._candidates(stage, count), count):
            member = members[number]
            self._say(f"{member.worker.place.label} goes: it finishes what it holds")
            self._let_go(member)

    async def _candidates(self, stage: str, count: int) -> list[Candidate]:
        """Those who may go; what they have to do is asked where it makes a difference."""
        members = self._members[stage]
        working = [one.worker.name for one in members.values() if one.phase is Phase.WORKING]
        work: Mapping[str, Work] = {}
        if count < len(members) and len(working) > 1:
            work = await self._work_of(working)
        return [Candidate(n, one.phase, work.get(one.worker.name, Work())) for n, one in members.items()]

    async def _work_of(self, names: Sequence[str]) -> dict[str, Work]:
        replies = await ControlClient(self._connection, self.pool).ask("stats", to=names)
        return {name: work_told(answer.value) for name, answer in replies.answers.items()}

    def _let_go(self, member: Member) -> None:
        """Ask it to leave: it claims nothing more, finishes what it holds, keeps its blocks until they are fetched. May be called twice."""
        if member.phase is Phase.BROKEN and (member.life is None or member.life.done()):
            self._forget(member)
        elif member.ending is None:
            member.phase = Phase.LEAVING
            member.ending = asyncio.create_task(member.worker.child.stop(self._grace_s))

    # -- more -------------------------------------------------------------------------------------------------------------

    async def _increase(self, stage: str, count: int) -> None:
        if not count:
            self._lacking.discard(stage)
        for _ in range(count):
            gpus = self._gpus.take(self.pool, self._policy.stage(stage).gpus)
            if gpus is None:
                if stage not in self._lacking:
                    self._say(f"{self._prefix}{stage} waits for a GPU")
                self._lacking.add(stage)
                return
            self._lacking.discard(stage)
            number = first_free(self._members[stage])
            place = WorkerPlace(self.pool, stage, number, f"{self._prefix}{stage}-{number}")
            worker = self._processes.make(place, environment_of(self._gpus.names, gpus))
            member = Member(worker, gpus, self._restarts.setdefault((stage, number), Restarts()))
            self._members[stage][number] = member
            await self._start(member)

    async def _start_again(self, stage: str) -> None:
        for member in list(self._members[stage].values()):
            if member.phase is Phase.BROKEN and time.monotonic() >= member.again_s:
                await self._start(member)

    async def _start(self, member: Member) -> None:
        member.began_s = member.seen_s = time.monotonic()
        member.phase, member.has_served = Phase.STARTING, False
        try:
            await member.worker.child.start()
        except OSError as error:  # no memory, too many processes
            self._break(member, f"cannot be started ({error.strerror})")
            return
        member.life = asyncio.create_task(self._see_its_end(member))
        await self._lease.join(member.worker.name, member.worker.place.stage)

    # -- the end of one ---------------------------------------------------------------------------------------------------

    def _see_all(self) -> None:
        """While Redis does not answer, nobody is missing there."""
        for member in self._all():
            member.seen_s = time.monotonic()

    def _end_those_that_hang(self, stage: str) -> None:
        """Ours that never begin to serve, or no longer say that they live: they are killed, and so are started again."""
        now_s = time.monotonic()
        for member in self._members[stage].values():
            label, missing_s = member.worker.place.label, now_s - member.seen_s
            if member.phase is Phase.STARTING and missing_s > self._policy.start_limit_s:
                self._say(f"{label} does not serve after {now_s - member.began_s:.0f} s: killed")
            elif member.phase is Phase.WORKING and missing_s > self._unseen_s:
                self._say(f"{label} was not heard of for {missing_s:.0f} s: killed")
            else:
                continue
            member.phase = Phase.BROKEN  # when it is started again is known when it has ended
            member.again_s = float("inf")
            member.worker.child.kill()

    async def _see_its_end(self, member: Member) -> None:
        """Of its own will or not: what it held waits again, and its place is free, now or after a while."""
        label, name = member.worker.place.label, member.worker.name
        code = await member.worker.child.ended()
        if code != 0:
            await self._processes.give_back_tasks_of(member.worker)
        with contextlib.suppress(BatonError):
            await self._lease.leave(name)
        if member.phase is Phase.LEAVING:
            if member.ending is not None:
                await member.ending
            is_early = code == -signal.SIGTERM and not member.has_served  # it did not listen to signals yet
            self._say(f"{label} has gone" if code == 0 or is_early else f"{label} {ending(code)} while it left")
            self._forget(member)
        else:
            self._break(member, ending(code))
        self._rung.set()

    def _break(self, member: Member, what: str) -> None:
        delay_s = member.restarts.delay_s(time.monotonic() - member.began_s)
        member.phase, member.again_s = Phase.BROKEN, time.monotonic() + delay_s
        self._say(f"{member.worker.place.label} {what}: its place is empty for {delay_s:g} s")

    def _forget(self, member: Member) -> None:
        self._gpus.give_back(member.gpus)
        self._members[member.worker.place.stage].pop(member.worker.place.number, None)

    def _all(self) -> list[Member]:
        return [member for members in self._members.values() for member in members.values()]


def work_told(stats: Any) -> Work:
    """What a worker's answer to `stats` says of its work."""
    try:
        engine, transfer = stats["pool"], stats["transfer"]
        tasks = max(int(stats.get("held", 0)), int(engine["running"]) + int(engine["waiting"]))
        return Work(int(transfer["handles"]), tasks, int(engine["blocks_used"]))
    except (KeyError, TypeError, ValueError):
        return Work()
