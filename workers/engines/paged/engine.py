"""`AsyncEngine` over any `Runner`: checks what comes, moves blocks in and out, and leaves the steps to the `Stepper`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping

from pipeline.errors import ConfigError, EngineDied, Unservable
from pipeline.kv_events import KVEvent
from pipeline.protocol import BackendInput, KVHandle, LLMEngineOutput, Log
from pipeline.waiting import left_alone
from workers.engine import EngineInfo, EngineStats, Prefilled
from workers.engines.paged.blocks import BlockPool
from workers.engines.paged.exchange import ExportedBlocks, FetchedBlocks
from workers.engines.paged.jobs import Job, cancelled, new_job, sampling_choices
from workers.engines.paged.prompts import scores_of
from workers.engines.paged.refusals import refuse_foreign, refuse_foreign_tokens, refuse_unserved
from workers.engines.paged.runner import Runner, RunnerInfo
from workers.engines.paged.scheduler import Scheduler
from workers.engines.paged.shaping import Constraint
from workers.engines.paged.stepper import LoggedStep, Stepper
from workers.transfer import Transfer


class PagedEngine:
    """An `AsyncEngine` of paged blocks. Starts and closes the runner and the transfer that it is given."""

    def __init__(self, runner: Runner, transfer: Transfer) -> None:
        self._runner = runner
        self._transfer = transfer
        self._arrivals = itertools.count()
        self._steps_task: asyncio.Task[None] | None = None
        self._compiling: dict[str, asyncio.Future[Mapping[int, Constraint]]] = {}  # grammars, by request
        self._is_closed = False
        self._info: EngineInfo | None = None

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
        await self._transfer.start(self._runner.device)
        self._info = describe(runner)
        self._vocab_size = runner.vocab_size
        self._scores_prompts = runner.scores_prompts
        self._pool = BlockPool(runner.num_blocks, runner.block_size, prefix_cache=runner.prefix_cache)
        self._scheduler = Scheduler(
            self._pool, max_num_seqs=runner.max_num_seqs, max_num_batched_tokens=runner.max_num_batched_tokens
        )
        self._stepper = Stepper(self._runner, self._pool, self._scheduler, self._info.max_model_len)
        self._steps_task = asyncio.create_task(self._stepper.run(), name=f"steps of {runner.name}")

    async def prefill(self, request: BackendInput, done: Log) -> Prefilled:
        """See `AsyncEngine.prefill`."""
        self._check(request, done)
        if all(done.finished):
            return Prefilled(outputs=[], kv=None, cached_tokens=0)
        constraints = await self._constraints(request, done, to_export=True)
        job = new_job(
            request, done, next(self._arrivals), self.info.max_model_len, constraints, to_export=True, scores=scores_of(request)
        )  # fmt: skip
        self._stepper.submit(job)
        try:
            cached_tokens = await job.joined
            outputs = await job.computed
            ended = {output.choice for output in outputs if output.finish_reason is not None}
            if all(reason or choice in ended for choice, reason in enumerate(done.finished)):
                return Prefilled(outputs=outputs, kv=None, cached_tokens=cached_tokens)
            return Prefilled(outputs=outputs, kv=await self._export(job, cached_tokens), cached_tokens=cached_tokens)
        finally:
            self._stepper.drop(job)

    async def decode(self, request: BackendInput, kv: KVHandle | None, done: Log) -> int:
        """See `AsyncEngine.decode`."""
        self._check(request, done)
        if kv is not None:
            refuse_foreign(request, kv, self.info)
        constraints = await self._constraints(request, done, to_export=False)
        job = new_job(
            request, done, next(self._arrivals), self.info.max_model_len, constraints, to_export=False,
            scores=scores_of(request) if kv is None else None,
        )  # fmt: skip
        if not job.sequences:
            self._stepper.end(job.complete)
            return 0
        job.leader.fetch_tokens = kv.num_tokens if kv is not None else 0
        self._stepper.submit(job)
        try:
            cached_tokens = await job.joined
            self._require(job)
            if kv is None:
                return cached_tokens
            await self._fetch(job, kv)
            return kv.num_tokens
        except BaseException:
            self._stepper.drop(job)
            raise

    async def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """See `AsyncEngine.steps`. Raises `EngineDied` when a whole step failed. One reader."""
        while (outputs := await self._stepper.next_outputs()) is not None:
            yield outputs

    async def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        """See `AsyncEngine.kv_events`. This engine does not tell."""
        for _ in ():
            yield []

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `AsyncEngine.cancel`. Blocks that the step in flight writes to are free when it ends."""
        if (compiling := self._compiling.get(request_id)) is not None:
            compiling.cancel()  # of one choice nobody knows anything yet that could end it
        self._stepper.silence(request_id, choice)
        job = self._stepper.job(request_id)
        if job is None:
            return
        if choice is None:
            self._stepper.drop(job)
            return
        for sequence in [sequence for sequence in job.sequences if sequence.choice == choice]:
            self._stepper.leave(job, sequence)

    async def release(self, handle_id: str) -> None:
        """See `AsyncEngine.release`."""
        await self._transfer.release(handle_id)

    def stats(self) -> EngineStats:
        """See `AsyncEngine.stats`."""
        transfer = self._transfer.stats()
        counters = self._stepper.counters
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
            fetched=transfer.fetched,
            steps=counters.times.steps,
            busy_s=counters.times.busy_s,
            step_ms=counters.times.average_ms,
        )

    def step_log(self) -> list[LoggedStep]:
        """The last steps, oldest first."""
        return list(self._stepper.log)

    async def close(self) -> None:
        """See `AsyncEngine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._steps_task is not None:
            self._stepper.stop()
            await asyncio.wait([self._steps_task])
            self._stepper.drop_all()
        await self._transfer.close()
        await self._runner.close()

    def _check(self, request: BackendInput, done: Log) -> None:
        """Raise for what cannot be served at all."""
        if self._stepper.death is not None:
            raise self._stepper.death
        if self._is_closed:
            raise EngineDied(f"request {request.request_id}: the engine is closed")
        if self._stepper.job(request.request_id) is not None or request.request_id in self._compiling:
            raise Unservable(f"request {request.request_id} is already in this engine")
        refuse_unserved(request, done, self.info)
        if request.output_options.prompt_logprobs is not None and not self._scores_prompts:
            raise Unservable(f"request {request.request_id}: this model's logits of a prompt cannot be had in parts")
        refuse_foreign_tokens(request, self._vocab_size)

    async def _constraints(self, request: BackendInput, done: Log, *, to_export: bool) -> Mapping[int, Constraint]:
        """The grammars of the choices that get tokens, once they are compiled; others go on meanwhile."""
        logs = {choice: done.tokens[choice] for choice in sampling_choices(done, to_export=to_export)}
        if request.sampling_options.guided_decoding is None or not logs:
            return {}
        compiling = asyncio.ensure_future(self._runner.constrain(request, logs))
        self._compiling[request.request_id] = compiling
        try:
            constraints = await compiling
        finally:
            del self._compiling[request.request_id]
        self._check(request, done)  # the engine may have ended meanwhile
        return constraints

    def _require(self, job: Job) -> None:
        """Raise where the job was cancelled while its coroutine had yet to go on: its blocks are no longer its own."""
        if not self._stepper.holds(job):
            raise cancelled(job)

    async def _export(self, job: Job, cached_tokens: int) -> KVHandle:
        self._require(job)
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
        left_alone(job.transfer)
        await asyncio.shield(job.transfer)
        self._require(job)
        self._stepper.join(job, kv.num_tokens)


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
