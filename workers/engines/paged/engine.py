"""The loop that turns requests into steps: schedule, run, commit. Implements `AsyncEngine` over any `Runner`.

All state is owned by the event loop; the runner computes elsewhere. Blocks that a running step writes to are given back
only after it, so cancelling is immediate and never races with it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec

from pipeline.errors import ConfigError, EngineDied, KVLost, Unservable
from pipeline.protocol import BackendInput, FinishReason, KVHandle, LLMEngineOutput, Log
from workers.engine import EngineInfo, EngineStats, Prefilled
from workers.engines.paged.blocks import BlockPool
from workers.engines.paged.exchange import ExportedBlocks, FetchedBlocks
from workers.engines.paged.refusals import refuse_unserved
from workers.engines.paged.runner import Chosen, Row, RowFailure, Runner, RunnerInfo
from workers.engines.paged.scheduler import ScheduledRow, Scheduler, Step
from workers.engines.paged.sequence import Place, Sequence, finish_reason
from workers.transfer import Transfer

MAX_UNREAD_STEPS = 256  # the engine pauses while its reader is this far behind
STEP_LOG_LENGTH = 1024


class LoggedStep(msgspec.Struct, frozen=True):
    """What a step computed: (request id, choice, first position, tokens) of each row, and the blocks held meanwhile."""

    step: int
    rows: list[tuple[str, int, int, int]]
    blocks_used: int
    preempted: list[tuple[str, int]]


@dataclass(slots=True, eq=False)
class Job:
    """What the engine holds of a request: the choices that have not ended, and who waits for it."""

    request: BackendInput
    sequences: list[Sequence]
    joined: asyncio.Future[int]  # decode: admitted; the prompt tokens that were in the prefix cache
    computed: asyncio.Future[list[LLMEngineOutput]]  # prefill: the first outputs
    complete: list[LLMEngineOutput] = field(default_factory=list)  # decode: choices whose log was complete on arrival
    source: Sequence | None = None  # prefill: whose blocks are exported
    transfer: asyncio.Future[Any] | None = None  # copies from or to the blocks, which are kept until it is done

    @property
    def leader(self) -> Sequence:
        """The choice that computes or fetches the prompt."""
        return next(sequence for sequence in self.sequences if sequence.place is not Place.FOLLOWING)


class Counters:
    """The figures of `EngineStats` that only grow."""

    def __init__(self) -> None:
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.prompt_tokens_computed = 0
        self.recomputed_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.steps = 0
        self.step_ms = 0.0


class PagedEngine:
    """An `AsyncEngine` of paged blocks. Starts and closes the runner and the transfer that it is given."""

    def __init__(self, runner: Runner, transfer: Transfer) -> None:
        self._runner = runner
        self._transfer = transfer
        self._jobs: dict[str, Job] = {}
        self._arrivals = itertools.count()
        self._counters = Counters()
        self._log: deque[LoggedStep] = deque(maxlen=STEP_LOG_LENGTH)
        self._unread: deque[list[LLMEngineOutput]] = deque()
        self._ended: list[LLMEngineOutput] = []  # outputs that no step computes
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._read = asyncio.Event()
        self._is_computing = False
        self._left: list[Sequence] = []  # left while a step was computed: to be released after it
        self._loop_task: asyncio.Task[None] | None = None
        self._death: EngineDied | None = None
        self._is_closed = False
        self._info: EngineInfo | None = None

    # -- the contract ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Known after `start`."""
        assert self._info is not None, "the engine has not started"
        return self._info

    async def start(self) -> None:
        """See `AsyncEngine.start`."""
        runner = await self._runner.start()
        if runner.max_num_batched_tokens <= runner.max_num_seqs:
            raise ConfigError(
                f"engine.{runner.name}.max_num_batched_tokens ({runner.max_num_batched_tokens}) must be above "
                f"max_num_seqs ({runner.max_num_seqs}): each running sequence takes one token of a step"
            )
        await self._transfer.start()
        self._pool = BlockPool(runner.num_blocks, runner.block_size, prefix_cache=runner.prefix_cache)
        self._scheduler = Scheduler(
            self._pool, max_num_seqs=runner.max_num_seqs, max_num_batched_tokens=runner.max_num_batched_tokens
        )
        self._info = describe(runner)
        self._loop_task = asyncio.create_task(self._run(), name=f"engine {runner.name}")

    async def prefill(self, request: BackendInput, done: Log) -> Prefilled:
        """See `AsyncEngine.prefill`."""
        self._check(request, done)
        job = self._new_job(request, done, to_export=True)
        self._submit(job)
        try:
            cached_tokens = await job.joined
            outputs = await job.computed
            ended = {output.choice for output in outputs if output.finish_reason is not None}
            if all(reason or choice in ended for choice, reason in enumerate(done.finished)):
                return Prefilled(outputs=outputs, kv=None, cached_tokens=cached_tokens)
            return Prefilled(outputs=outputs, kv=await self._export(job, cached_tokens), cached_tokens=cached_tokens)
        finally:
            self._drop(job)

    async def decode(self, request: BackendInput, kv: KVHandle | None, done: Log) -> int:
        """See `AsyncEngine.decode`."""
        self._check(request, done)
        if kv is not None:
            self._check_handle(request, kv)
        job = self._new_job(request, done, to_export=False)
        self._end_complete(job)
        if not job.sequences:
            self._end(job.complete)
            return 0
        job.leader.fetch_tokens = kv.num_tokens if kv is not None else 0
        self._submit(job)
        try:
            cached_tokens = await job.joined
            if kv is None:
                return cached_tokens
            await self._fetch(job, kv)
            return min(kv.num_tokens, len(request.token_ids))
        except BaseException:
            self._drop(job)
            raise

    async def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """See `AsyncEngine.steps`. Raises `EngineDied` when a whole step failed. One reader."""
        while True:
            while self._unread:
                outputs = self._unread.popleft()
                self._read.set()
                if outputs:
                    yield outputs
            if self._death is not None:
                raise self._death
            if self._is_closed:
                return
            self._news.clear()
            await self._news.wait()

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `AsyncEngine.cancel`. Blocks that the running step writes to are free when that step ends."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        for outputs in self._unread:
            outputs[:] = [o for o in outputs if o.request_id != request_id or choice not in (None, o.choice)]
        if choice is None:
            self._drop(job)
            return
        for sequence in [sequence for sequence in job.sequences if sequence.choice == choice]:
            self._leave(job, sequence)

    async def release(self, handle_id: str) -> None:
        """See `AsyncEngine.release`."""
        await self._transfer.release(handle_id)

    def stats(self) -> EngineStats:
        """See `AsyncEngine.stats`."""
        transfer = self._transfer.stats()
        counters = self._counters
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            blocks_used=self._pool.used,
            blocks_free=self._pool.free,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            prompt_tokens_computed=counters.prompt_tokens_computed,
            recomputed_tokens=counters.recomputed_tokens,
            output_tokens=counters.output_tokens,
            preemptions=counters.preemptions,
            handles_exported=transfer.handles,
            handle_bytes=transfer.bytes_used,
            handle_bytes_free=transfer.bytes_free,
            steps=counters.steps,
            step_ms=counters.step_ms,
        )

    def step_log(self) -> list[LoggedStep]:
        """The last steps, oldest first."""
        return list(self._log)

    async def close(self) -> None:
        """See `AsyncEngine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._work.set()
        self._read.set()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        for job in list(self._jobs.values()):
            self._drop(job)
        self._news.set()
        await self._transfer.close()
        await self._runner.close()

    # -- a request comes -----------------------------------------------------------------------------------------------

    def _check(self, request: BackendInput, done: Log) -> None:
        """Raise for what cannot be served at all."""
        if self._death is not None:
            raise self._death
        if self._is_closed:
            raise EngineDied(f"request {request.request_id}: the engine is closed")
        if request.request_id in self._jobs:
            raise Unservable(f"request {request.request_id} is already in this engine")
        refuse_unserved(request, done, self.info)

    def _check_handle(self, request: BackendInput, kv: KVHandle) -> None:
        blocks = self._pool.blocks_for(kv.num_tokens)
        if kv.layout != self.info.layout:
            raise KVLost(f"handle {kv.id}: layout {kv.layout}, this engine has {self.info.layout}", reason="layout")
        if not 0 < kv.num_tokens <= len(request.token_ids) or kv.num_blocks != blocks:
            raise KVLost(
                f"handle {kv.id}: {kv.num_tokens} tokens in {kv.num_blocks} blocks for a prompt of "
                f"{len(request.token_ids)} tokens",
                reason="layout",
            )

    def _new_job(self, request: BackendInput, done: Log, *, to_export: bool) -> Job:
        """One sequence for each choice that has not ended; the first without a token leads, the others follow."""
        loop = asyncio.get_running_loop()
        arrival = next(self._arrivals)
        choices = [choice for choice, reason in enumerate(done.finished) if reason is None]
        if to_export:
            lacking = [choice for choice in choices if not done.tokens[choice]]
            choices = lacking or choices[:1]
        choices.sort(key=lambda choice: bool(done.tokens[choice]))
        sequences = [
            Sequence(
                request,
                choice,
                arrival,
                output=[] if to_export else list(done.tokens[choice]),
                to_export=to_export,
                to_sample=not (to_export and done.tokens[choice]),
            )
            for choice in choices
        ]
        return Job(request, sequences, loop.create_future(), loop.create_future())

    def _end_complete(self, job: Job) -> None:
        """Choices whose log is complete, although nobody has said so, end without a step."""
        for sequence in list(job.sequences):
            reason = finish_reason(job.request, sequence.output, self.info.max_model_len)
            if reason is not None and sequence.output:
                job.sequences.remove(sequence)
                job.complete.append(output_of(sequence, [], reason))

    def _end(self, outputs: list[LLMEngineOutput]) -> None:
        """Outputs that need no computing leave with the next step."""
        self._ended += outputs
        self._work.set()

    def _submit(self, job: Job) -> None:
        leader, *followers = job.sequences
        leader.followers = followers
        for follower in followers:
            follower.leader, follower.place = leader, Place.FOLLOWING
        self._jobs[job.request.request_id] = job
        self._scheduler.add(leader)
        self._work.set()

    async def _export(self, job: Job, cached_tokens: int) -> KVHandle:
        assert job.source is not None
        blocks = ExportedBlocks(
            self._runner,
            request_id=job.request.request_id,
            layout=self.info.layout,
            blocks=job.source.table.tolist(),
            block_nbytes=self.info.block_nbytes,
            num_tokens=job.source.computed,
            cached_tokens=cached_tokens,
        )
        job.transfer = export = asyncio.ensure_future(self._transfer.export(blocks))
        try:
            return await export
        except asyncio.CancelledError:
            if export.done() and not export.cancelled() and export.exception() is None:
                await self._transfer.release(export.result().id)
            raise

    async def _fetch(self, job: Job, kv: KVHandle) -> None:
        """Fill the leader's blocks from the handle; those that the prefix cache gave are right already."""
        leader = job.leader
        sink = FetchedBlocks(
            self._runner,
            layout=self.info.layout,
            blocks=leader.table.tolist(),
            block_nbytes=self.info.block_nbytes,
            skip=leader.computed // self._pool.block_size,
        )
        job.transfer = asyncio.ensure_future(self._transfer.fetch(kv, sink))
        await asyncio.shield(job.transfer)
        if not self._is_held(job):
            raise cancelled(job)
        self._join(job, kv)

    def _join(self, job: Job, kv: KVHandle) -> None:
        leader = job.leader
        leader.fetch_tokens = 0
        leader.computed = max(leader.computed, min(kv.num_tokens, leader.length - 1))
        leader.reached = max(leader.reached, kv.num_tokens)
        self._publish_blocks(leader, 0)
        self._scheduler.join(leader)
        self._fork(leader)
        self._end(job.complete)

    # -- a step ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Step after step until closed. What a whole step raises ends the engine."""
        try:
            while not self._is_closed:
                step = self._scheduler.schedule()
                self._admit(step)
                if step.rows or self._ended:
                    await self._take(step)
                elif not step.preempted:  # else the queue has changed: decide again
                    self._work.clear()
                    await self._work.wait()
                while len(self._unread) >= MAX_UNREAD_STEPS and not self._is_closed:
                    self._read.clear()
                    await self._read.wait()
        except Exception as error:  # noqa: BLE001 - whatever it was, the engine is dead and every waiter is told
            self._die(error)

    def _admit(self, step: Step) -> None:
        for sequence in step.admitted:
            job = self._jobs[sequence.request.request_id]
            if not job.joined.done():
                cached_tokens = min(sequence.computed, sequence.prompt_length)
                job.joined.set_result(cached_tokens)
                if not sequence.fetch_tokens:
                    self._ended += job.complete
                self._counters.prefix_query_tokens += sequence.prompt_length
                self._counters.prefix_hit_tokens += cached_tokens

    async def _take(self, step: Step) -> None:
        """Compute the step and commit it. From here until it is committed no block is given back."""
        started = perf_counter()
        samplers = [row.sequence.samplers() if row.is_last else [] for row in step.rows]
        rows = [as_row(row, group) for row, group in zip(step.rows, samplers, strict=True)]
        self._record(step)
        self._is_computing = True
        try:
            await asyncio.sleep(0)  # who waited for admission goes on before the outputs of the step appear
            chosen = iter(await self._runner.run(rows) if rows else [])
        finally:
            self._is_computing = False
        outputs, self._ended = self._ended, []
        for row, group in zip(step.rows, samplers, strict=True):
            self._commit(row, [(sampler, next(chosen)) for sampler in group], outputs)
        for sequence in self._left:
            self._scheduler.release(sequence)
        self._left.clear()
        self._counters.steps += 1
        self._counters.step_ms += 0.1 * ((perf_counter() - started) * 1000 - self._counters.step_ms)
        if outputs:
            self._unread.append(outputs)
            self._news.set()

    def _commit(self, row: ScheduledRow, drawn: list[tuple[Sequence, Chosen]], outputs: list[LLMEngineOutput]) -> None:
        """The row is computed: its blocks are known, its choices have their token, its followers what they waited for."""
        sequence = row.sequence
        if sequence.place is not Place.RUNNING:
            return  # it left while the step was computed
        self._count(row)
        before, sequence.computed = sequence.computed, row.start + row.count
        self._publish_blocks(sequence, before)
        job = self._jobs[sequence.request.request_id]
        drawn_outputs = [self._take_token(sampler, value) for sampler, value in drawn if sampler in job.sequences]
        if sequence.to_export:
            if sequence.computed == sequence.length or drawn:
                self._end_prefill(job, sequence, drawn_outputs)
            return
        outputs += drawn_outputs
        ended = {output.choice for output in drawn_outputs if output.finish_reason is not None}
        ended_sequences = [other for other in job.sequences if other.choice in ended] if ended else []
        for follower in ended_sequences:
            if follower is not sequence:
                self._leave(job, follower)
        if sequence.followers and sequence.computed >= sequence.prompt_length:
            self._fork(sequence)
        if sequence in ended_sequences:
            self._leave(job, sequence)

    def _take_token(self, sequence: Sequence, value: Chosen) -> LLMEngineOutput:
        if isinstance(value, RowFailure):
            self._runner.clear(self._pool.forget(sequence.table))
            return output_of(sequence, [], FinishReason.ERROR, value.message)
        sequence.output.append(value)
        self._counters.output_tokens += 1
        return output_of(sequence, [value], finish_reason(sequence.request, sequence.output, self.info.max_model_len))

    def _end_prefill(self, job: Job, leader: Sequence, outputs: list[LLMEngineOutput]) -> None:
        """The prompt is computed: the leader leaves the batch, but keeps its blocks until they are exported."""
        for sequence in reversed(job.sequences):
            self._scheduler.leave(sequence)
        job.source = leader
        if not job.computed.done():
            job.computed.set_result(outputs)

    def _publish_blocks(self, sequence: Sequence, before: int) -> None:
        """Make the blocks that became full since `before` tokens findable."""
        size = self._pool.block_size
        first, end = before // size, sequence.computed // size
        if end > first and self._pool.prefix_cache:
            hashes = sequence.block_hashes(sequence.computed, size)
            for index in range(first, end):
                self._pool.publish(sequence.table[index], hashes[index])

    def _fork(self, leader: Sequence) -> None:
        for source, target in self._scheduler.fork(leader):
            self._runner.copy_block(source, target)

    def _count(self, row: ScheduledRow) -> None:
        sequence, end = row.sequence, row.start + row.count
        if row.start >= sequence.reached and row.start >= sequence.prompt_length:
            sequence.reached = end  # a token of the answer, the first time: as nearly always
            return
        new = max(row.start, sequence.reached)
        self._counters.recomputed_tokens += min(end, new) - row.start
        self._counters.prompt_tokens_computed += max(0, min(end, sequence.prompt_length) - new)
        sequence.reached = max(sequence.reached, end)

    def _record(self, step: Step) -> None:
        self._counters.preemptions += len(step.preempted)
        rows = [(row.sequence.request.request_id, row.sequence.choice, row.start, row.count) for row in step.rows]
        preempted = [(sequence.request.request_id, sequence.choice) for sequence in step.preempted]
        self._log.append(LoggedStep(self._counters.steps, rows, self._pool.used, preempted))

    # -- a request goes ------------------------------------------------------------------------------------------------

    def _is_held(self, job: Job) -> bool:
        return self._jobs.get(job.request.request_id) is job

    def _drop(self, job: Job) -> None:
        """Forget a request: nobody waits for it, none of its choices is scheduled, its blocks are given back."""
        if self._is_held(job):
            del self._jobs[job.request.request_id]
        for waiter in (job.joined, job.computed):
            waiter.cancel()
        if job.source is not None and job.transfer is not None:
            job.transfer.cancel()  # an export may be waiting for room
        for sequence in list(job.sequences):
            self._leave(job, sequence)

    def _leave(self, job: Job, sequence: Sequence) -> None:
        """A choice goes; with the last one its request."""
        job.sequences.remove(sequence)
        self._scheduler.leave(sequence)
        if job.transfer is not None and not job.transfer.done():
            job.transfer.add_done_callback(lambda _: self._give_back(sequence))
        else:
            self._give_back(sequence)
        if not job.sequences and self._is_held(job):
            del self._jobs[job.request.request_id]

    def _give_back(self, sequence: Sequence) -> None:
        """Release the blocks, after the running step if there is one: it may be writing to them."""
        if self._is_computing:
            self._left.append(sequence)
        else:
            self._scheduler.release(sequence)
        self._work.set()

    def _die(self, error: Exception) -> None:
        self._death = EngineDied(f"step {self._counters.steps} failed: {type(error).__name__}: {error}")
        self._death.__cause__ = error
        for job in list(self._jobs.values()):
            for waiter in (job.joined, job.computed):
                if not waiter.done():
                    waiter.set_exception(self._death)
                    waiter.exception()  # not every waiter is waited for
        self._news.set()


def describe(runner: RunnerInfo) -> EngineInfo:
    """What the engine over this runner is. No sequence is longer than all blocks together."""
    return EngineInfo(
        name=runner.name,
        model=runner.model,
        layout=runner.layout,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        block_nbytes=runner.block_nbytes,
        max_model_len=min(runner.max_model_len, runner.num_blocks * runner.block_size),
        max_num_seqs=runner.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
    )


def as_row(row: ScheduledRow, samplers: list[Sequence]) -> Row:
    """The row as the runner sees it."""
    sequence, end = row.sequence, row.start + row.count
    return Row(sequence.tokens(row.start, end), row.start, sequence.table, [sampler.draw() for sampler in samplers])


def output_of(
    sequence: Sequence, token_ids: list[int], reason: FinishReason | None, error: str | None = None
) -> LLMEngineOutput:
    """The output of a choice whose newest tokens are these."""
    index = len(sequence.output) - len(token_ids)
    return LLMEngineOutput(sequence.request.request_id, sequence.choice, index, token_ids, reason, None, error)


def cancelled(job: Job) -> asyncio.CancelledError:
    """What prefill and decode raise for a request that was cancelled meanwhile."""
    return asyncio.CancelledError(f"request {job.request.request_id} was cancelled")
