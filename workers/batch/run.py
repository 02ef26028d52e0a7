"""One batch, from where it stands to its end.

    validating  ── all lines are right ──> in_progress ── all have run, or time is over ──> finalizing ──> completed | expired
        └── one is not ──> failed               └── cancelled by its owner ──> cancelling ──> cancelled

A batch is in one worker's hands at a time. What the worker has of it that Redis and the store of files have not can be made again, so a
worker may die at any point: who takes the batch up next skips the lines that are in parts, and finds the requests of others by their keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec
import structlog

from pipeline.batches.gate import LEAST, load_of, next_window
from pipeline.batches.lines import Findings, Line, RawLine, check, line_again, model_of, raw_lines
from pipeline.batches.record import CANCELLING, FAILED, FINALIZING, IN_PROGRESS, VALIDATING, BatchRecord, LineError
from pipeline.batches.records import BatchRecords, Done, Fenced, Hold
from pipeline.config import BatchesSettings
from pipeline.errors import FileLost, ModelNotFound, NoSuchFile, NotAllowed, RedisUnavailable, StorageUnavailable
from pipeline.files.record import FileRecord
from pipeline.files.store import FileStore
from pipeline.pools import ServedPool, pool_of
from pipeline.surface.endpoints import ENDPOINTS, Asker
from pipeline.waiting import until_first
from workers.batch.ending import NO_FILES, finish, remove_files
from workers.batch.results import Parts
from workers.batch.sending import Result, Sender
from workers.batch.tidy import Leftovers

LOOK_S = 0.25  # between two looks at the pools, and at whether something is due
AGAIN_S = 1.0
UNANSWERED = (499, 504)  # statuses of lines that were cancelled, or whose time ran out
LOOKAHEAD_LINES, LOOKAHEAD_BYTES = 256, 4 * 2**20  # that are put in an order of common prefixes

log = structlog.get_logger("baton.batches")


class _Flight:
    """The lines of a batch that are under way. What was stopped, or ran out of time, without an answer did not run."""

    def __init__(self, record: BatchRecord, sender: Sender, parts: Parts) -> None:
        self.record = record
        self.parts = parts
        self.tasks: set[asyncio.Task[Result]] = set()
        self.pool: ServedPool | None = None  # of the line that was sent last
        self.looked_s = 0.0
        self.is_stopped = False
        self._sender = sender
        self._completed, self._failed = record.completed, record.failed

    async def __aenter__(self) -> _Flight:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def figures(self) -> tuple[int, int, int]:
        """Lines that succeeded, lines that failed, all lines."""
        return self._completed, self._failed, self.record.total

    def send(self, line: Line) -> None:
        """One more."""
        self.tasks.add(asyncio.create_task(self._sender.answer(line), name=f"line {line.number}"))

    async def land(self, limit_s: float) -> None:
        """Take the answers that there are; wait for one where there is none."""
        landed, _ = await asyncio.wait(self.tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        self.tasks -= landed
        for result in [task.result() for task in landed]:
            is_over = (
                self.is_stopped or time.time() >= self.record.deadline_s
            )  # requests have the deadline of their batch
            if is_over and result.status in UNANSWERED:
                continue
            self.parts.add(result)
            self._completed += result.is_success
            self._failed += not result.is_success

    async def stop(self, why: str) -> None:
        """Answers that come from now on are those that were there before."""
        self.is_stopped = True
        await self._sender.stop(why)


class BatchRun:
    """See the module's docstring. `tell`: is given (completed, failed, total) as they grow."""

    def __init__(
        self,
        files: FileStore,
        records: BatchRecords,
        pools: Mapping[str, ServedPool],
        settings: BatchesSettings,
        asker: Asker,
        hold: Hold,
        leftovers: Leftovers,
        tell: Callable[[int, int, int], object],
    ) -> None:
        self._files = files
        self._records = records
        self._pools = pools
        self._settings = settings
        self._asker = asker
        self._hold = hold
        self._leftovers = leftovers
        self._tell = tell
        self._window = min(LEAST, settings.max_in_flight)
        self._is_cancelling = False
        self._answered: tuple[int, int] | None = None
        self._has_ended = False

    async def run(self, after_s: float = 0.0) -> None:
        """Bring the batch to its end, beginning so much later. Raises Fenced when somebody else has it."""
        work, watch = asyncio.create_task(self._work(after_s)), asyncio.create_task(self._keep_hold())
        try:
            await until_first([work, watch])
        finally:
            if self._has_ended:  # not before the watch has ended, which is fenced when the batch is over
                await self._tidy_up()

    async def _tidy_up(self) -> None:
        """Behind a batch that has ended; what cannot be removed now a worker finds that looks for it."""
        try:
            await self._leftovers.remove(self._hold.batch_id)
        except (RedisUnavailable, StorageUnavailable) as error:
            log.warning("what a batch left stays for now", batch_id=self._hold.batch_id, error=str(error))

    async def _work(self, after_s: float) -> None:
        await asyncio.sleep(after_s)  # with the batch in hand, so that nobody else takes it meanwhile
        await self._insist(self._to_end)

    async def _to_end(self) -> None:
        try:
            await self._go_on()
        except FileLost as error:  # it will not come back
            record = await self._record()
            await self._fail(record, [await self._why_lost(record) or LineError(error.code, str(error))])

    async def _why_lost(self, record: BatchRecord) -> LineError | None:
        """Whether it is the input, and its owner who removed it."""
        if record.state not in (VALIDATING, IN_PROGRESS):
            return None
        try:
            await self._files.find(record.input_file_id, record.owner)
            return None
        except NoSuchFile as error:
            return LineError(error.code, f"deleted, or expired, while the batch ran: {error}")

    async def _go_on(self) -> None:
        record = await self._record()
        if record.state == CANCELLING:
            await self._stop_left(record, "the batch was cancelled")
        if record.state == VALIDATING:
            record = await self._validate(record)
        if record.state == IN_PROGRESS:
            try:
                file = await self._files.find(record.input_file_id, record.owner)
            except NoSuchFile as error:
                raise FileLost(str(error)) from error
            record = await self._answer(record, file)
        if record.state in (FINALIZING, CANCELLING):
            await finish(record, self._files, self._records, self._hold)
            self._has_ended = True

    # -- steps ----------------------------------------------------------------------------------------------------------

    async def _validate(self, record: BatchRecord) -> BatchRecord:
        """All lines are right, or none runs."""
        findings = Findings()
        try:
            file = await self._files.find(record.input_file_id, record.owner)
            findings = await check(
                self._raw(file, self._settings.max_line_bytes), record.endpoint, most_lines=self._settings.max_lines,
                longest=self._settings.max_line_bytes, serves=lambda model: self._check_model(record, model),
            )  # fmt: skip
        except NoSuchFile as error:
            findings.add(LineError("file_not_found", str(error)))
        if findings.errors:
            await self._fail(record, findings.errors)
        else:
            (model,) = findings.models if len(findings.models) == 1 else ("",)
            now_s = int(time.time())
            await self._records.turn(
                record,
                IN_PROGRESS,
                self._hold,
                total=findings.total,
                lines=findings.lines,
                model=model,
                in_progress_s=now_s,
            )
            log.info("batch begins", batch_id=record.id, lines=findings.total, model=model)
        return await self._record()

    async def _fail(self, record: BatchRecord, errors: Sequence[LineError]) -> None:
        await self._stop_left(record, "the batch failed")
        await remove_files(record, self._files)
        told = msgspec.json.encode(errors).decode()
        await self._records.turn(record, FAILED, self._hold, errors=told, failed_s=int(time.time()), **NO_FILES)
        log.warning("batch failed", batch_id=record.id, errors=len(errors), first=errors[0].message)
        self._has_ended = True

    def _check_model(self, record: BatchRecord, model: str) -> None:
        if record.models and model not in record.models.split():
            raise NotAllowed(f"the API key may not use the model {model[:100]!r}")
        pool_of(self._pools, model)

    async def _answer(self, record: BatchRecord, file: FileRecord) -> BatchRecord:
        """Send what is not done, as many at once as the gate lets through, until all is done or nothing more may be sent."""
        done = await self._records.done(record.id)
        parts = Parts(
            self._files.scratch, self._records, self._hold, self._leftovers,
            most_lines=self._settings.part_lines, longest_s=self._settings.part_s,
        )  # fmt: skip
        sender = self._sender(record)
        async with _Flight(record, sender, parts) as flight:
            async with contextlib.aclosing(self._ordered(file, done)) as lines:
                async for line in lines:
                    await self._room(flight, line)
                    if self._is_over(record):
                        break
                    flight.send(line)
            while flight.tasks:
                if self._is_over(record) and not flight.is_stopped:
                    await flight.stop(
                        "the batch was cancelled" if self._is_cancelling else "the time of the batch is over"
                    )
                await self._pass(flight)
        await self._insist(parts.keep)
        self._tell(*flight.figures)
        if not self._is_cancelling:
            await self._records.turn(record, FINALIZING, self._hold, finalizing_s=int(time.time()))
        return await self._record()

    def _sender(self, record: BatchRecord) -> Sender:
        return Sender(self._pools, self._asker, record.id, record.deadline_s)

    async def _stop_left(self, record: BatchRecord, why: str) -> None:
        """End what a worker sent that is no more, or what this one sent until it met an error: nobody will read it."""
        if record.state in (IN_PROGRESS, CANCELLING):
            done = await self._records.done(record.id)
            await self._sender(record).stop_left([line for line in range(record.lines) if line not in done], why)

    # -- while it runs --------------------------------------------------------------------------------------------------

    def _is_over(self, record: BatchRecord) -> bool:
        return self._is_cancelling or time.time() >= record.deadline_s

    async def _room(self, flight: _Flight, line: Line) -> None:
        """Wait until one more may be sent, or none may be."""
        while len(flight.tasks) >= self._window and not self._is_over(flight.record):
            await self._pass(flight)
        if flight.looked_s + LOOK_S < time.monotonic():
            with contextlib.suppress(ModelNotFound):  # nobody serves it any more, which will be the line's answer
                await self._look(flight, line)

    async def _pass(self, flight: _Flight) -> None:
        """Wait for an answer, or a moment; then do what is due."""
        await flight.land(LOOK_S)
        if flight.parts.is_due:
            await self._insist(flight.parts.keep)
        self._answered = flight.figures[:2]
        self._tell(*flight.figures)
        if flight.looked_s + LOOK_S < time.monotonic():
            await self._look(flight, None)

    async def _look(self, flight: _Flight, line: Line | None) -> None:
        flight.looked_s = time.monotonic()
        if line is not None:
            flight.pool = pool_of(self._pools, model_of(line.body))
        if flight.pool is None:
            return
        load = load_of(await flight.pool.client.snapshot(), ENDPOINTS[flight.record.endpoint].stage)
        settings = self._settings
        self._window = next_window(
            self._window, len(flight.tasks), load, most=settings.max_in_flight, live_share=settings.live_share
        )

    async def _keep_hold(self) -> None:
        """Renew the lease and hear of a cancel. Raises Fenced."""
        while True:
            try:
                self._is_cancelling = await self._records.hold(self._hold, self._answered) == CANCELLING
            except RedisUnavailable as error:
                log.warning("Redis is away, the batch waits", batch_id=self._hold.batch_id, error=str(error))
            await asyncio.sleep(min(1.0, self._settings.lease_s / 5))

    # -- reading --------------------------------------------------------------------------------------------------------

    def _raw(self, file: FileRecord, longest: int) -> AsyncIterator[RawLine]:
        return raw_lines(self._files.blocks(file, 0, file.bytes), longest)

    async def _ordered(self, file: FileRecord, done: Done) -> AsyncGenerator[Line]:
        """The lines that are not done, some at a time in the order of their bodies: prompts that begin alike are computed once."""
        some: list[Line] = []
        size = 0
        async for raw in self._raw(file, file.bytes):
            if raw.number in done:
                continue
            some.append(line_again(raw))
            size += len(some[-1].body)
            if len(some) >= LOOKAHEAD_LINES or size >= LOOKAHEAD_BYTES:
                for line in sorted(some, key=lambda line: line.body):
                    yield line
                some, size = [], 0
        for line in sorted(some, key=lambda line: line.body):
            yield line

    async def _record(self) -> BatchRecord:
        record = await self._records.find(self._hold.batch_id)
        if record is None:
            raise Fenced(self._hold.batch_id)
        return record

    async def _insist(self, step: Callable[[], Awaitable[object]]) -> None:
        """Do it again as long as Redis or the store is away: the lease ends it when that is too long for others."""
        while True:
            try:
                await step()
                return
            except (RedisUnavailable, StorageUnavailable) as error:
                log.warning(
                    "the batch waits", batch_id=self._hold.batch_id, error=str(error), then=f"again in {AGAIN_S:g} s"
                )
                await asyncio.sleep(AGAIN_S)
