"""A client of one pool: submits requests and streams their tokens. The API has one for each pool; so does anything in Python.

Life of a request here: route (pure) -> admit (script) -> stream (bus, repaired from the log) -> ended, or cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog

from pipeline.config import QueueSettings, RouterSettings, WorkerSettings
from pipeline.connection import Connection, Subscription
from pipeline.ends import Ends
from pipeline.errors import BatonError, LowLaneFull, QueueFull, RedisUnavailable
from pipeline.protocol import UNREADABLE, EndItem, Frame, Log, Request
from pipeline.queue import LANES, Admission, Limits, PoolQueue, Restored, Standing
from pipeline.routing import DisaggregatedRouter, retry_after_s
from pipeline.snapshot import PoolSnapshot, take_snapshot
from pipeline.stream import RequestStream
from pipeline.waiting import wait_at_most

log = structlog.get_logger("baton.client")

SNAPSHOT_S = 0.5
CLOSE_S = 5.0  # what is still to be said to Redis when the client closes


class PoolClient:
    """See the module's docstring. Use as `async with PoolClient(...) as client`."""

    def __init__(
        self,
        connection: Connection,
        pool: str,
        name: str,
        *,
        queue: QueueSettings,
        router: RouterSettings,
        worker: WorkerSettings,
        buffer_items: int = 4096,
        silence_s: float = 2.0,
    ) -> None:
        self.pool = pool
        self.queue = PoolQueue(connection, pool)
        self._connection = connection
        self._name = name
        self._settings = queue
        self._initial_router = router
        self._worker = worker
        self._buffer_items = buffer_items
        self._silence_s = silence_s
        self._streams: dict[str, list[RequestStream]] = {}
        self._snapshot = PoolSnapshot()
        self._load = self._snapshot.load()
        self._drained_per_s: dict[str, float] = {}
        self._router = DisaggregatedRouter(router)
        self.ends = Ends(self.queue.standing)
        self._answered_s = time.monotonic()  # when Redis last answered a call of the background
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._abandoned: set[asyncio.Task[None]] = set()
        self._pool_changed = asyncio.Event()
        self.redis_error: str | None = None  # why the last background call failed; None while Redis answers

    async def __aenter__(self) -> PoolClient:
        self._subscription = await self._connection.subscribe(
            self.queue.keys.bus(self._name), self.queue.keys.bell("pool")
        )
        await self._refresh()
        self._tasks = [
            asyncio.create_task(self._keep(self._receive), name=f"bus {self.pool}"),
            asyncio.create_task(self._keep(self._watch), name=f"watch {self.pool}"),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        closed = "the client was closed"
        self.ends.fail(BatonError(closed))
        for readers in list(self._streams.values()):
            for stream in readers:
                stream.give_up(closed)
        if self._abandoned:
            _, late = await asyncio.wait(self._abandoned, timeout=CLOSE_S)
            for task in late:
                task.cancel()
        with contextlib.suppress(BatonError):
            await self.queue.leave("api", self._name)
        if self._subscription is not None:
            await self._subscription.close()

    # -- requests -------------------------------------------------------------------------------------------------------

    async def submit(
        self, request: Request, *, priority: str = "default", deadline_s: float | None = None, idempotency_key: str = "",
        body_digest: str = "", linger_s: float | None = 0.0, delay_s: float = 0.0, stage: str = "", max_held: int = 0,
    ) -> RequestStream:  # fmt: skip
        """Admit a request and stream it. Raises `QueueFull` and `KeyBusy` with `retry_after_s`, `RedisUnavailable`.

        Where `idempotency_key` names a request that lives or is done already, that one is read from its first token, as `attach` does,
        and `stream.request` is the stored one; with another digest `IdempotencyConflict` is raised. `deadline_s` is at most the
        lane's. `linger_s`: how long it goes on without a reader, or after this process ended without leaving; None: to its end.
        `delay_s`: nobody claims it before. `stage`: of a task; where a generation starts is the router's to say. `max_held`: requests of
        its owner that may wait and run in the pool, 0: no limit.
        """
        admission = self._route(
            Admission(
                request, stage, priority, self._name, priority=priority, linger_s=linger_s, delay_s=delay_s,
                idempotency_key=idempotency_key, digest=body_digest,
            )
        )  # fmt: skip
        limits = dataclasses.replace(self._limits(priority, deadline_s), max_held=max_held)
        stream = self._open(request.id, request.input.sampling_options.n, request=request, linger_s=linger_s)
        stream.serve(functools.partial(self._restore, admission, limits, time.monotonic()))
        admitting = asyncio.ensure_future(self.queue.admit(admission, limits))
        try:
            admitted = await asyncio.shield(admitting)
        except QueueFull as refusal:
            await self._forget(stream)
            raise self._refusal(admission, refusal) from refusal
        except asyncio.CancelledError:
            await self._forget(stream)
            self._abandon(request.id, admitting)
            raise
        except RedisUnavailable:
            await self._forget(stream)
            self._abandon(request.id, admitting)  # it may have been admitted, and only the answer was lost
            raise
        except BaseException:
            await self._forget(stream)
            raise
        if admitted == request.id:
            return stream
        await self._forget(stream)
        found = await self.find(admitted)
        if found is None:  # its record expired just now, so the key is free
            return await self.submit(
                request, priority=priority, deadline_s=deadline_s, idempotency_key=idempotency_key,
                body_digest=body_digest, linger_s=linger_s, delay_s=delay_s, stage=stage, max_held=max_held,
            )  # fmt: skip
        log.debug("attached by its idempotency key", request_id=admitted)
        return await self.attach(admitted, found=found)

    async def admit(
        self, request: Request, *, stage: str = "", priority: str = "default", deadline_s: float | None = None,
        delay_s: float = 0.0, idempotency_key: str = "", body_digest: str = "", max_held: int = 0, insists: bool = False,
    ) -> str:  # fmt: skip
        """Admit a request that nobody streams; `ends.wait` tells when it is over. Returns its id, or that of the first request of the
        key. It goes on whatever becomes of this process, unless this raises. `stage`: of one's own; left out: where the router says.
        `deadline_s` may be longer than the lane's; it runs from when the request may be claimed. `max_held`: as for `submit`.
        `insists`: whatever is raised, the caller comes again under its key, so what may have been admitted is left for it.

        Raises `QueueFull` and `KeyBusy` with `retry_after_s`, `IdempotencyConflict`, `RedisUnavailable`.
        """
        admission = self._route(
            Admission(
                request, stage, priority, "", priority=priority, idempotency_key=idempotency_key, digest=body_digest,
                delay_s=delay_s, notify=self._name,
            )
        )  # fmt: skip
        limits = dataclasses.replace(self._limits(priority, None), max_held=max_held)
        if deadline_s is not None:
            limits = dataclasses.replace(limits, deadline_s=deadline_s)
        admitting = asyncio.ensure_future(self.queue.admit(admission, limits))
        try:
            return await asyncio.shield(admitting)
        except QueueFull as refusal:
            raise self._refusal(admission, refusal) from refusal
        except (asyncio.CancelledError, RedisUnavailable):
            if not insists:
                self._abandon(request.id, admitting)  # it may have been admitted, and only the answer was lost
            raise

    def deadline_s(self, priority: str) -> float:
        """How long a request of this lane lives at most, where it is not said otherwise."""
        return self._settings.lane(priority).deadline_s

    def _route(self, admission: Admission) -> Admission:
        """Where it starts: a task in the stage that it names, a generation as the pool looks now."""
        if admission.request.task is not None:
            return admission
        request = admission.request
        prompt_tokens = len(request.input.token_ids)
        n = request.input.sampling_options.n
        route = self._router.route(prompt_tokens, 0, self._load, admission.priority, n=n)
        log.debug("routed", request_id=request.id, stage=route.stage, lane=route.lane, why=route.why)
        return dataclasses.replace(admission, stage=route.stage, lane=route.lane)

    def _limits(self, priority: str, deadline_s: float | None) -> Limits:
        lane = self._settings.lane(priority)
        return Limits(
            lane.max_waiting_tasks, lane.max_waiting_tokens, min(deadline_s or lane.deadline_s, lane.deadline_s),
            self._settings.result_ttl_s, self._settings.dead_ttl_s,
        )  # fmt: skip

    def _refusal(self, admission: Admission, refusal: QueueFull) -> QueueFull:
        """When to come again: what waits, at the pace at which it has been drained. Work that can wait is told that it has to."""
        waiting = self._snapshot.waiting(admission.stage, admission.lane)
        rate = self._drained_per_s.get(f"{admission.stage}:{admission.lane}", 0.0)
        after_s = refusal.retry_after_s or retry_after_s(waiting, rate)
        kind = LowLaneFull if admission.priority == "low" else QueueFull
        return kind(str(refusal), retry_after_s=after_s)

    async def _restore(self, admission: Admission, limits: Limits, admitted_s: float, delivered: Log) -> Restored:
        """Redis lost (the end of) a request that this process serves: admit it again under its id, with what its reader was sent."""
        left_s = max(1.0, limits.deadline_s - (time.monotonic() - admitted_s))
        log.warning(
            "Redis lost a request or the end of its log, admitting it again", request_id=admission.request.id,
            tokens=[len(tokens) for tokens in delivered.tokens],
        )  # fmt: skip
        limits = dataclasses.replace(limits, deadline_s=left_s)
        return await self.queue.restore(dataclasses.replace(self._route(admission), delay_s=0.0), limits, delivered)

    def _abandon(self, request_id: str, admitting: asyncio.Future[str]) -> None:
        """Nobody waits any more for a request that may be on its way into Redis: end it once it is there."""

        async def end() -> None:
            with contextlib.suppress(BatonError):  # whether it was admitted is not known
                await admitting
            await self.queue.cancel(request_id, "its client left while it was admitted")

        self._insist(end, request_id)

    def leave_later(self, stream: RequestStream, reason: str) -> None:
        """Its reader has gone while Redis was away: say so as soon as Redis answers."""
        self._insist(lambda: stream.leave(reason), stream.id)

    def _insist(self, say: Callable[[], Awaitable[object]], request_id: str) -> None:
        """Say it in the background until Redis has heard it, or until the request's deadline has ended it anyway."""

        async def insist() -> None:
            give_up_s = time.monotonic() + self._settings.deadline_s
            while time.monotonic() < give_up_s:
                try:
                    await say()
                except BatonError:
                    await asyncio.sleep(1.0)
                else:
                    return

        task = asyncio.create_task(insist(), name=f"leave {request_id}")
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def find(self, request_id: str) -> Standing | None:
        """Where a request stands, with what was asked for; None when it is unknown or its record has expired."""
        return await self.queue.attach(request_id, watch=False, with_request=True)

    async def attach(
        self, request_id: str, choices: int = 0, *, found: Standing | None = None, start: Sequence[int] = ()
    ) -> RequestStream:
        """Read a request that somebody else may be serving; several readers may attach.

        From its first token on, or behind the first `start` tokens of each choice of a request that was `found`.
        """
        if found is None or found.request is None:
            stream = self._open(request_id, choices, watch=True, is_creator=False)
        else:
            choices = found.request.input.sampling_options.n
            stream = self._open(
                request_id, choices, watch=True, is_creator=False, request=found.request, linger_s=found.linger_s
            )
            stream.begin(found, start or [0] * choices)
            if found.has_ended:
                return stream
            priority = found.lane if found.lane in LANES else "default"
            admission = Admission(
                found.request, found.stage, priority, self._name, priority=priority, linger_s=found.linger_s
            )
            stream.serve(functools.partial(self._restore, admission, self._limits(priority, None), time.monotonic()))
        try:
            assert self._subscription is not None
            await self._subscription.add(self.queue.keys.tokens(request_id))  # once it is in force, the log is read
        except BaseException:
            await self._forget(stream)
            raise
        return stream

    async def snapshot(self) -> PoolSnapshot:
        """The pool as it was at most half a second ago."""
        return self._snapshot

    def _open(
        self, request_id: str, choices: int, *, watch: bool = False, is_creator: bool = True, request: Request | None = None,
        linger_s: float | None = 0.0,
    ) -> RequestStream:  # fmt: skip
        stream = RequestStream(
            request_id, choices, buffer_items=self._buffer_items, patience_s=self._settings.deadline_s,
            read=functools.partial(self.queue.attach, watch=watch), cancel=self.queue.cancel, forget=self._forget,
            linger=self.queue.linger, read_prompt=self.queue.prompt_logprobs, request=request, is_creator=is_creator, linger_s=linger_s,
        )  # fmt: skip
        self._streams.setdefault(request_id, []).append(stream)
        return stream

    async def _forget(self, stream: RequestStream) -> None:
        readers = self._streams.get(stream.id, [])
        if stream in readers:
            readers.remove(stream)
        if not readers:
            self._streams.pop(stream.id, None)
            if self._subscription is not None and self.queue.keys.tokens(stream.id) in self._subscription.channels:
                with contextlib.suppress(RedisUnavailable):
                    await self._subscription.remove(self.queue.keys.tokens(stream.id))

    # -- the bus --------------------------------------------------------------------------------------------------------

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Background work goes on whatever happens: without it every stream would hang."""
        while True:
            try:
                await work()
            except Exception as error:  # a mistake of ours; said with its stack, and not the end of all streams
                log.exception("background work failed, starting it again", pool=self.pool, error=str(error))
            await asyncio.sleep(1.0)

    async def _receive(self) -> None:
        """Hand out frames; does nothing else, so that one busy stream never delays the others."""
        decode = msgspec.msgpack.Decoder(Frame).decode
        streams, bell = self._streams, self.queue.keys.bell("pool")
        assert self._subscription is not None
        async for channel, data in self._subscription.messages():
            if data is None or channel == bell:
                self._pool_changed.set()
                if data is None:
                    self._resubscribed(channel)
                continue
            try:
                items = decode(data)
            except UNREADABLE as error:
                log.error("frame is not readable, streams go on from their logs", channel=channel, error=str(error))
                self._resubscribed(self.queue.keys.bus(self._name))
                continue
            for item in items:
                if isinstance(item, EndItem):
                    self.ends.feed(item.id)
                for stream in streams.get(item.id, ()):
                    if isinstance(item, EndItem):
                        stream.feed_end(item)
                    else:
                        stream.feed(item)

    def _resubscribed(self, channel: str) -> None:
        everything = channel == self.queue.keys.bus(self._name)
        for request_id, readers in self._streams.items():
            if everything or channel == self.queue.keys.tokens(request_id):
                for stream in readers:
                    stream.fall_behind()

    # -- the background ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Each half second, or when the bell rings: renew, sweep, read the pool; send silent streams to their logs."""
        while True:
            try:
                await self._refresh()
                await self._keep_read()  # before this or any other sweep finds out that a reader has left
                await self.queue.sweep(  # with no worker alive nobody else ends what is past its deadline
                    self._name, interval_s=self._worker.sweep_s, lease_s=self._worker.lease_s,
                    max_attempts=self._worker.max_attempts,
                )  # fmt: skip
                await self.ends.look()
                self.redis_error, self._answered_s = None, time.monotonic()
            except BatonError as error:
                if self.redis_error is None:
                    log.warning("Redis does not answer, requests wait", pool=self.pool, error=str(error))
                self.redis_error = str(error)
                if time.monotonic() - self._answered_s > self._settings.deadline_s:
                    self.ends.fail(error)
            now_s = time.monotonic()
            for readers in list(self._streams.values()):
                for stream in readers:
                    if stream.silent_for_s(now_s) > self._silence_s:
                        stream.fall_behind()
            await wait_at_most(self._pool_changed, SNAPSHOT_S)
            self._pool_changed.clear()

    async def _keep_read(self) -> None:
        """Requests that would linger without a reader have one here, whatever another reader said when it left."""
        read = self._lingering()
        if not read:
            return
        await self.queue.still_read(list(read))
        for request_id in read.keys() - self._lingering().keys():  # it was left while this was said
            await self.queue.linger(request_id, read[request_id])

    def _lingering(self) -> dict[str, float]:
        return {
            stream.id: stream.linger_s
            for readers in self._streams.values()
            for stream in readers
            if stream.linger_s and not stream.is_left
        }

    async def _refresh(self) -> None:
        await self.queue.renew("api", self._name, b"", self._worker.lease_s)
        before, self._snapshot = self._snapshot, await take_snapshot(self._connection, self.queue.keys)
        self._load = self._snapshot.load()
        self._router = DisaggregatedRouter(self._snapshot.router(self._initial_router))
        self._drained_per_s = drained_per_s(self._drained_per_s, before, self._snapshot)


def drained_per_s(rates: dict[str, float], before: PoolSnapshot, after: PoolSnapshot) -> dict[str, float]:
    """Claims a second by stage and lane: an average over about ten readings between which something waited all the time. A lane
    that was empty meanwhile says nothing of how fast it could have been drained."""
    seconds = (after.time_ms - before.time_ms) / 1000
    if before.time_ms == 0 or seconds <= 0:
        return rates
    updated = dict(rates)
    for name, value in after.counters.items():
        if name.startswith("claimed:"):
            lane = name.removeprefix("claimed:")
            if not before.waiting(*lane.split(":", 1)):
                continue
            rate = max(0, value - before.counters.get(name, 0)) / seconds
            updated[lane] = 0.9 * rates[lane] + 0.1 * rate if lane in rates else rate
    return updated
