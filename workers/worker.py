"""A worker process: claims tasks of one stage, runs their handlers, settles their outcomes, keeps their leases.

Life of a delivery: claim -> decode -> run -> classify -> settle -> report. Each is a method here; the handler is the only part
that differs between stages:

    worker = Worker(...)

    @worker.task("prefill", queue="prefill")
    async def prefill(task: Task) -> Outcome: ...

A worker reads the lanes of one queue. Several tasks may share it: a request for a stage of one's own names its task.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, assert_never

import msgspec
import structlog

from pipeline.config import QueueSettings, WorkerSettings
from pipeline.connection import Connection, Subscription
from pipeline.errors import BatonError, HandlerStuck, RedisUnavailable, WireError
from pipeline.protocol import UNREADABLE, BellNote, CancelNote, FreeNote, KVHandle, Note, Request
from pipeline.queue import LANES, Delivery, PoolQueue, Verdict, delivery_key
from pipeline.waiting import until_first, wait_at_most
from workers.holdings import Held, Holdings, Task
from workers.limits import TimeLimits, run_within
from workers.outcome import Answer, Done, Dropped, Fail, Handover, Outcome, Reject, Retry, classify, packed
from workers.policy import backoff_s, engines_view, held_back, is_news, lane_looks
from workers.reports import Reports, lost, told

log = structlog.get_logger("baton.worker")

HANDED_BACK = {"parked": Answer.TAKEN, "dead": Answer.DEAD}  # what the script answers; all else: it is not ours
LISTED = 8  # ids in a line of the log
LEFT_TO_OTHERS_S = 0.025  # a little more than SPARE_MS of claim.lua

Handler = Callable[[Task], Coroutine[Any, Any, Outcome]]
AnyHandler = TypeVar("AnyHandler", bound=Handler)


@dataclasses.dataclass(frozen=True, slots=True)
class Registered:
    """A task that this worker runs."""

    handler: Handler
    limits: TimeLimits
    max_attempts: int


class Capacity(Protocol):
    """What a worker may start now; asked before each claim."""

    def free_blocks(self, share: float = 1.0) -> int:
        """Blocks that a new task may take of what its lane may fill; 0 claims nothing."""
        ...

    def step_fill(self) -> float:
        """Tokens that are held, of those of a step. From 1 on a new task would wait behind what runs here."""
        ...

    def total_blocks(self) -> int:
        """Blocks of the largest task that could ever start here."""
        ...

    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    def describe(self) -> bytes:
        """What the worker says of itself with each renewal."""
        ...


class Resources(Protocol):
    """What a worker's notes act on: the engine's side of cancel and free."""

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Stop a request locally."""
        ...

    async def release(self, handle_id: str) -> None:
        """Free exported blocks."""
        ...


class Worker:
    """See the module's docstring. `run` returns after `drain` was called and everything held is settled."""

    def __init__(
        self, connection: Connection, pool: str, name: str, settings: WorkerSettings, queue: QueueSettings, *,
        holdings: Holdings, capacity: Capacity, resources: Resources,
    ) -> None:  # fmt: skip
        self.name = name
        self.reports = Reports()
        self.queue = PoolQueue(connection, pool)
        self._connection = connection
        self._settings = settings
        self._holdings = holdings
        self._capacity = capacity
        self._resources = resources
        self._queue_settings = queue
        self._claims = 0
        self._is_ahead = False  # at the last claim
        self._came_s: dict[str, float] = {}  # when a task of each priority did
        self._swept: dict[str, int] = {}  # what its last sweep did
        self._stage = ""
        self._tasks: dict[str, Registered] = {}
        self.is_stuck = False  # a handler does not end: this process has to
        self._is_known = False  # Redis has heard of it, and answered when it was last told
        # blocks that this worker owns until they are fetched: handle id -> request id
        self._exported: dict[str, str] = {}
        self._bell = asyncio.Event()
        self._renew_now = asyncio.Event()
        self._draining = asyncio.Event()
        self._give_up_s = math.inf  # monotonic time at which a leaving worker stops waiting for anything
        self._claim_nonce = ""
        self._decode_request = msgspec.msgpack.Decoder(Request).decode
        self._decode_handle = msgspec.msgpack.Decoder(KVHandle).decode

    def task(
        self, name: str, *, queue: str, time_limit: float | None = None, soft_time_limit: float | None = None,
        max_attempts: int | None = None,
    ) -> Callable[[AnyHandler], AnyHandler]:  # fmt: skip
        """Register the handler of a task; `queue` is the stage whose lanes this worker reads. Limits: see `workers/limits.py`."""
        if name in self._tasks or self._stage not in ("", queue):
            raise ValueError(f"worker {self.name} already runs {self._stage}; it cannot run {name} of {queue}, too")

        def register(handler: AnyHandler) -> AnyHandler:
            self._stage = queue
            limits = TimeLimits(soft_time_limit, time_limit)
            self._tasks[name] = Registered(handler, limits, max_attempts or self._settings.max_attempts)
            return handler

        return register

    def drain(self) -> None:
        """Stop claiming, finish what is held within `drain_s`, hand back the rest. May be called twice."""
        if not self._draining.is_set():
            self._give_up_s = time.monotonic() + self._settings.drain_s
            self.announce()
        self._draining.set()
        self._bell.set()

    def leave_now(self) -> None:
        """Drain without waiting: what is held is handed back at once, and no attempt is counted. May be called twice."""
        self.drain()
        self._give_up_s = time.monotonic()

    @property
    def is_draining(self) -> bool:
        """Whether it claims nothing any more and leaves."""
        return self._draining.is_set()

    @property
    def is_at_work(self) -> bool:
        """Whether Redis knows it and answers, and it is not leaving."""
        return self._is_known and not self.is_draining

    @property
    def stage(self) -> str:
        """The stage whose tasks it runs."""
        return self._stage

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that it runs."""
        return sorted(self._tasks)

    @property
    def lanes(self) -> list[str]:
        """The lanes that it reads, in this order."""
        return self._lanes()

    @property
    def exported(self) -> int:
        """Handles whose blocks this worker keeps until they are fetched."""
        return len(self._exported)

    def wake(self) -> None:
        """Capacity has changed: look at the lanes again."""
        self._bell.set()

    def announce(self) -> None:
        """Say to Redis at once what this worker says of itself, not with the next renewal."""
        self._renew_now.set()

    async def run(self) -> None:
        """Work until drained."""
        subscription = await self._connection.subscribe(
            self.queue.keys.control(self.name), self.queue.keys.bell(self._stage)
        )
        await self._renew()
        background = [
            asyncio.create_task(work, name=f"{self.name} {label}")
            for label, work in (
                ("notes", self._take_notes(subscription)),
                ("leases", self._keep_leases()),
                ("sweep", self._sweep()),
            )
        ]
        log.info("ready", worker=self.name, stage=self._stage, lanes=self._lanes())
        working = asyncio.create_task(self._work(), name=f"{self.name} claims")
        try:
            await until_first([working, *background])  # without its background its leases would run out unseen
        finally:
            with contextlib.suppress(BatonError):
                await self.queue.leave(self._stage, self.name)
            await subscription.close()
        log.info("left", worker=self.name)

    async def _work(self) -> None:
        await self._claim_until_drained()
        await self._finish_held()

    def _lanes(self) -> list[str]:
        return [f"@{self.name}", *LANES]

    # -- claim ----------------------------------------------------------------------------------------------------------

    async def _claim_until_drained(self) -> None:
        while not self._draining.is_set():
            was_rung = self._bell.is_set()
            self._bell.clear()
            delivery = await self._claim()
            if delivery is not None:
                self._start(delivery)
                continue
            limit_s = self._settings.sweep_s  # a lost bell costs one interval
            if was_rung and self._is_ahead:  # it left what came for others: by then they have it, or all are busy
                limit_s = min(limit_s, LEFT_TO_OTHERS_S)
            await wait_at_most(self._bell, limit_s)

    async def _claim(self) -> Delivery | None:
        free = {lane: self._capacity.free_blocks(self._queue_settings.lane(lane).prefill_share) for lane in LANES}
        if max(free.values()) <= 0 or self._holdings.has_suspect():
            return None
        fill, now_s = self._capacity.step_fill(), time.monotonic()
        self._is_ahead = fill >= 1  # others who are idle come first
        shares = {lane: self._queue_settings.lane(lane).step_share for lane in LANES}
        held = held_back(fill, shares, {lane: now_s - came_s for lane, came_s in self._came_s.items()})
        looks = lane_looks(f"@{self.name}", self._claims, free, is_ahead=self._is_ahead, held_back=held)
        # kept until answered: a lost reply is given again
        self._claim_nonce = self._claim_nonce or secrets.token_hex(8)
        try:
            delivery = await self.queue.claim(
                self._stage, self.name, looks, total_blocks=self._capacity.total_blocks(), block_size=self._capacity.block_size(),
                overtake_ms=self._queue_settings.overtake_ms,
                guard_ms=self._queue_settings.guard_ms, held=len(self._holdings), nonce=self._claim_nonce,
            )  # fmt: skip
        except BatonError as error:
            log.warning("cannot claim, trying again", worker=self.name, error=str(error))
            return None
        self._claim_nonce = ""
        self._claims += delivery is not None
        if delivery is not None:
            self._came_s[delivery.priority] = now_s
        return delivery

    # -- one delivery ---------------------------------------------------------------------------------------------------

    def _start(self, delivery: Delivery) -> None:
        name = f"{self._stage} {delivery.id}"
        try:
            held = Held(self._decode(delivery))
        except WireError as error:
            self.reports.received(delivery, self._stage)
            job = asyncio.create_task(self._reject(delivery, Reject(str(error))), name=name)
            job.add_done_callback(_report_surprise)
            return
        with held.bound():
            self.reports.received(delivery, self._name_of(held.task.request))
            self._holdings.add(held)  # before the next claim, which counts it
            held.job = asyncio.create_task(self._deliver(held), name=name)
            held.job.add_done_callback(lambda _: self._let_go(held))
            held.job.add_done_callback(_report_surprise)

    async def _deliver(self, held: Held) -> None:
        started_s = time.monotonic()
        outcome = packed(await self._run(held), self._queue_settings.max_result_bytes)
        held.is_settling = True
        answer = await self._settle(held.task.delivery, outcome, self._max_attempts(held))
        seconds = time.monotonic() - started_s
        self._let_go(held)  # the rest is only said: it keeps no room
        await self._report(held.task.delivery, self._name_of(held.task.request), outcome, answer, seconds)
        if self.is_stuck:  # only now: its request has ended, the others are handed back
            self.leave_now()

    async def _reject(self, delivery: Delivery, rejected: Reject) -> None:
        answer = await self._settle(delivery, rejected, max_attempts=0)
        await self._report(delivery, self._stage, rejected, answer, 0.0)

    async def _report(self, delivery: Delivery, task: str, outcome: Outcome, answer: Answer, seconds: float) -> None:
        if answer is Answer.UNSAID:  # that was said
            return
        said = told(outcome, answer, delivery.attempts)
        if answer is Answer.NOT_OURS:
            with contextlib.suppress(RedisUnavailable):  # then it is not known what became of it
                (brief,) = await self.queue.standing([delivery.id])
                said = lost(outcome.why if isinstance(outcome, Dropped) else "", brief)
        self.reports.settled(delivery, task, said, seconds)

    def _let_go(self, held: Held) -> None:
        """Its job is over, also when it was cancelled before its first step."""
        self._holdings.remove(held)
        self._bell.set()  # room for another one

    def _decode(self, delivery: Delivery) -> Task:
        try:
            request = self._decode_request(delivery.body)
            handle = self._decode_handle(delivery.handle) if delivery.handle else None
        except UNREADABLE as error:
            raise WireError(f"{delivery.id}: stored task is not readable: {error}") from error
        return Task(delivery, msgspec.structs.replace(request, input=engines_view(request.input, delivery)), handle)

    async def _run(self, held: Held) -> Outcome:
        name = self._name_of(held.task.request)
        task = self._tasks.get(name)
        if task is None:
            return Reject(f"unknown task {name!r}: worker {self.name} knows {', '.join(sorted(self._tasks))}")
        try:
            return await run_within(task.limits, name, task.handler(held.task))
        except asyncio.CancelledError:
            if not held.dropped:
                raise
            return Dropped(held.dropped)
        except HandlerStuck as error:
            self.is_stuck = True
            then = "this worker hands back what it holds and ends"
            log.error(
                "handler does not end when it is stopped", request_id=held.id, task=name, why=str(error), then=then
            )
            return Dropped(held.dropped) if held.dropped else classify(error)
        except Exception as error:  # whatever a handler raises becomes an outcome of its task
            if not isinstance(error, BatonError):
                log.exception("task raised unexpected", request_id=held.id, task=name, why=repr(error))
            return classify(error)

    def _name_of(self, request: Request) -> str:
        return self._stage if request.task is None else request.task.name

    def _max_attempts(self, held: Held) -> int:
        task = self._tasks.get(self._name_of(held.task.request))
        return task.max_attempts if task else self._settings.max_attempts

    async def _settle(self, delivery: Delivery, outcome: Outcome, max_attempts: int) -> Answer:
        """Say the outcome to Redis; while Redis is away, wait with it: the scripts may be repeated. A worker that has to leave
        gives up and says so: the lease runs out and another one goes on."""
        while True:
            try:
                return await self._say(delivery, outcome, max_attempts)
            except RedisUnavailable as error:
                leaves = time.monotonic() >= self._give_up_s
                then = "its lease runs out" if leaves else "trying again"
                log.warning("outcome not written", request_id=delivery.id, then=then, error=str(error))
                if leaves:
                    return Answer.UNSAID

    async def _say(self, delivery: Delivery, outcome: Outcome, max_attempts: int) -> Answer:
        match outcome:
            case Done():
                return await self._complete(delivery, outcome)
            case Handover():
                return await self._hand_over(delivery, outcome)
            case Retry():
                await self._resources.cancel(delivery.key)
                state = await self.queue.hand_back(
                    delivery, self.name, counts=outcome.counts, max_attempts=max_attempts, why=outcome.why,
                    delay_s=self._delay_s(delivery, outcome), is_suspect=outcome.is_suspect,
                )  # fmt: skip
                return HANDED_BACK.get(state, Answer.NOT_OURS)
            case Reject():
                state = await self.queue.hand_back(delivery, self.name, counts=True, max_attempts=0, why=outcome.why)
                return HANDED_BACK.get(state, Answer.NOT_OURS)
            case Fail():
                state, _ = await self.queue.end(
                    delivery.id, "failed", outcome.why, worker=self.name, epoch=delivery.epoch
                )
                return Answer.TAKEN if state == "failed" else Answer.NOT_OURS
            case Dropped():
                await self._resources.cancel(delivery.key)
                return Answer.NOT_OURS
            case _:
                assert_never(outcome)

    async def _complete(self, delivery: Delivery, done: Done) -> Answer:
        """The end, unless Redis has lost tokens since they were logged: then somebody goes on where its log ends now."""
        state, _ = await self.queue.end(
            delivery.id, "done", worker=self.name, epoch=delivery.epoch, result=done.result or b""
        )
        if state == "incomplete":
            why = "Redis lost the end of its log"
            log.warning("not done yet", request_id=delivery.id, why=why, then="it is computed again from there")
            await self.queue.hand_back(
                delivery, self.name, counts=False, max_attempts=self._settings.max_attempts, why=why
            )
        return Answer.TAKEN if state == "done" else Answer.NOT_OURS

    def _delay_s(self, delivery: Delivery, outcome: Retry) -> float:
        settings = self._settings
        if outcome.countdown is not None or not outcome.backs_off:
            return outcome.countdown or 0.0
        return backoff_s(delivery.attempts, settings.retry_backoff_s, settings.retry_backoff_max_s, random.random())

    async def _hand_over(self, delivery: Delivery, outcome: Handover) -> Answer:
        verdict, where = await self.queue.handover(
            delivery, self.name, outcome.outputs, outcome.kv, cached_tokens=outcome.cached_tokens
        )
        if outcome.kv is not None and verdict is Verdict.ACCEPTED and where == "decode":
            self._exported[outcome.kv.id] = delivery.id
        elif outcome.kv is not None:
            await self._resources.release(outcome.kv.id)
        return Answer.TAKEN if verdict is Verdict.ACCEPTED else Answer.NOT_OURS

    # -- leases, notes, sweep ---------------------------------------------------------------------------------------------

    async def _keep_leases(self) -> None:
        while True:
            await wait_at_most(self._renew_now, self._settings.lease_s / 4)
            self._renew_now.clear()
            try:
                await self._renew()
                await self._free_unwanted()
            except BatonError as error:  # not a lost lease: keep the blocks, ask again
                self._is_known = False
                log.warning("leases not renewed, trying again", worker=self.name, error=str(error))

    async def _renew(self) -> None:
        held = self._holdings.all()
        mine = await self.queue.renew(
            self._stage, self.name, self._capacity.describe(), self._settings.lease_s, [(h.id, h.epoch) for h in held]
        )
        self._is_known = True
        for delivery, still in zip(held, mine, strict=True):
            if not still and self._holdings.get(delivery.key) is delivery and not delivery.complete.done():
                delivery.drop("lease lost")

    async def _free_unwanted(self) -> None:
        exported = dict(self._exported)
        wanted = await self.queue.wanted(exported)
        for handle_id in exported.keys() - wanted:
            await self._free(handle_id)

    async def _free(self, handle_id: str) -> None:
        self._exported.pop(handle_id, None)
        await self._resources.release(handle_id)
        self._bell.set()

    async def _take_notes(self, subscription: Subscription) -> None:
        decode = msgspec.msgpack.Decoder(Note).decode
        async for _, data in subscription.messages():
            if data is None:  # subscribed anew: notes may have been missed
                self._bell.set()
                self._renew_now.set()
                continue
            try:
                note = decode(data)
            except UNREADABLE as error:
                log.error("note is not readable, left out", worker=self.name, error=str(error))
                continue
            match note:
                case BellNote():
                    self._bell.set()
                case FreeNote():
                    await self._free(note.handle_id)
                case CancelNote():
                    held = self._holdings.get(delivery_key(note.id, note.epoch))
                    if held is not None:
                        held.drop("ended elsewhere")

    async def _sweep(self) -> None:
        while True:
            try:
                done = await self.queue.sweep(
                    self.name, interval_s=self._settings.sweep_s, lease_s=self._settings.lease_s,
                    max_attempts=self._settings.max_attempts,
                )  # fmt: skip
                if is_news(done, self._swept):
                    log.info("swept", worker=self.name, **done)
                self._swept = done or self._swept
            except BatonError as error:
                log.warning("cannot sweep, trying again", worker=self.name, error=str(error))
            await asyncio.sleep(self._settings.sweep_s)

    # -- drain ------------------------------------------------------------------------------------------------------------

    async def _finish_held(self) -> None:
        """Finish what is held, keep exported blocks until they are fetched; after `drain_s` hand back the rest."""
        log.info("draining", worker=self.name, held=len(self._holdings), handles=len(self._exported))
        while (len(self._holdings) or self._exported) and time.monotonic() < self._give_up_s:
            self._bell.clear()
            await wait_at_most(self._bell, 0.2)
        if len(self._holdings):
            ids = [held.id for held in self._holdings.all()]
            log.warning(
                "handing back what is not finished", worker=self.name, held=len(ids), ids=ids[:LISTED],
                then="another worker takes it up; no attempt is counted",
            )  # fmt: skip
        redis_answers = True
        for held in self._holdings.all():
            with held.bound():
                await self._stop(held)
                if redis_answers:
                    outcome = Retry("drained", counts=False)
                    answer = await self._settle(held.task.delivery, outcome, self._max_attempts(held))
                    redis_answers = answer is not Answer.UNSAID

    async def _stop(self, held: Held) -> None:
        """Cancel its handler and wait for it."""
        if held.job is None:
            return
        held.job.cancel()
        await asyncio.wait([held.job], timeout=5)
        if not held.job.done():
            self.is_stuck = True
            log.error("handler does not end when it is stopped", request_id=held.id, then="this process ends")


def _report_surprise(job: asyncio.Task[Any]) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        log.error("delivery was not settled; its lease runs out and another worker takes it", error=repr(error))
