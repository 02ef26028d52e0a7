"""Step after step: schedule, run, commit. The one owner of blocks, sequences and jobs.

All state is changed in the event loop; the runner computes elsewhere. Blocks that a step in flight reads or writes are given
back only after it, so cancelling is immediate and never races with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter

import msgspec

from pipeline.errors import EngineDied
from pipeline.protocol import FinishReason, LLMEngineOutput
from workers.engines.paged.blocks import BlockPool
from workers.engines.paged.jobs import Job, output_of
from workers.engines.paged.prompts import Asked
from workers.engines.paged.runner import Chosen, Row, RowFailure, Runner, Scored
from workers.engines.paged.scheduler import ScheduledRow, Scheduler, Step
from workers.engines.paged.sequence import Place, Sequence
from workers.engines.step_times import StepTimes

MAX_UNREAD_STEPS = 256  # the engine pauses while its reader is this far behind
STEP_LOG_LENGTH = 1024


class LoggedStep(msgspec.Struct, frozen=True):
    """What a step computed: (request id, choice, first position, tokens) of each row, and the blocks held meanwhile."""

    step: int
    rows: list[tuple[str, int, int, int]]
    blocks_used: int
    preempted: list[tuple[str, int]]


class Counters:
    """The figures of `EngineStats` that only grow."""

    def __init__(self) -> None:
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.prompt_tokens_computed = 0
        self.recomputed_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.times = StepTimes()


class Stepper:
    """Runs the steps of all jobs that it was given, from `run` until `stop`."""

    def __init__(self, runner: Runner, pool: BlockPool, scheduler: Scheduler, max_model_len: int) -> None:
        self.counters = Counters()
        self.log: deque[LoggedStep] = deque(maxlen=STEP_LOG_LENGTH)
        self.death: EngineDied | None = None
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._max_model_len = max_model_len
        self._jobs: dict[str, Job] = {}
        self._unread: deque[list[LLMEngineOutput]] = deque()
        self._ended: list[LLMEngineOutput] = []  # outputs that no step computes
        self._left: list[Sequence] = []  # left while a step was in flight: to be released after it
        self._is_in_flight = False
        self._is_stopped = False
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._read = asyncio.Event()

    # -- jobs come, join and go --------------------------------------------------------------------------------------

    def job(self, request_id: str) -> Job | None:
        """The job of a request, while it is held."""
        return self._jobs.get(request_id)

    def holds(self, job: Job) -> bool:
        """Whether this job, not only one of its id, is held."""
        return self._jobs.get(job.request.request_id) is job

    def submit(self, job: Job) -> None:
        """Queue a job; `job.joined` is set when it is admitted."""
        self._jobs[job.request.request_id] = job
        self._scheduler.add(job.leader)
        self._work.set()

    def join(self, job: Job, num_tokens: int) -> None:
        """The leader's blocks hold the fetched keys of so many tokens: the job runs from the next step on."""
        leader = job.leader
        leader.fetch_tokens = 0
        leader.computed = max(leader.computed, min(num_tokens, leader.length - 1))
        leader.reached = max(leader.reached, num_tokens)
        self._publish_blocks(leader, 0)
        self._scheduler.join(leader)
        self._fork(leader)
        self.end(job.complete)

    def end(self, outputs: list[LLMEngineOutput]) -> None:
        """Outputs that need no computing leave with the next step."""
        self._ended += outputs
        self._work.set()

    def drop(self, job: Job) -> None:
        """Forget a job: nobody waits for it, none of its choices is scheduled, its blocks are given back."""
        if self.holds(job):
            del self._jobs[job.request.request_id]
        for waiter in (job.joined, job.computed):
            waiter.cancel()
        if job.source is not None and job.transfer is not None:
            job.transfer.cancel()  # an export may be waiting for room
        for sequence in list(job.sequences):
            self.leave(job, sequence)

    def drop_all(self) -> None:
        """Forget all jobs."""
        for job in list(self._jobs.values()):
            self.drop(job)

    def leave(self, job: Job, sequence: Sequence) -> None:
        """A choice goes; with the last one its job."""
        job.sequences.remove(sequence)
        self._scheduler.leave(sequence)
        if job.transfer is not None and not job.transfer.done():
            job.transfer.add_done_callback(lambda _: self._give_back(sequence))
        else:
            self._give_back(sequence)
        if not job.sequences and self.holds(job):
            del self._jobs[job.request.request_id]

    def silence(self, request_id: str, choice: int | None) -> None:
        """Take back what was computed of a request, or of one choice, and is not read yet."""
        for outputs in (*self._unread, self._ended):
            outputs[:] = [o for o in outputs if o.request_id != request_id or choice not in (None, o.choice)]

    # -- its reader ----------------------------------------------------------------------------------------------------

    async def next_outputs(self) -> list[LLMEngineOutput] | None:
        """All outputs of the oldest step not read yet; None once stopped. Raises `EngineDied` when a whole step failed."""
        while True:
            while self._unread:
                outputs = self._unread.popleft()
                self._read.set()
                if outputs:
                    return outputs
            if self.death is not None:
                raise self.death
            if self._is_stopped:
                return None
            self._news.clear()
            await self._news.wait()

    def stop(self) -> None:
        """No step begins any more."""
        self._is_stopped = True
        for event in (self._work, self._read, self._news):
            event.set()

    # -- a step --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step after step until closed. What a whole step raises ends the engine."""
        try:
            while not self._is_stopped:
                step = self._scheduler.schedule()
                self._admit(step)
                if step.rows or self._ended:
                    await self._take(step)
                elif not step.preempted:  # else the queue has changed: decide again
                    self._work.clear()
                    await self._work.wait()
                while len(self._unread) >= MAX_UNREAD_STEPS and not self._is_stopped:
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
                self.counters.prefix_query_tokens += sequence.prompt_length
                self.counters.prefix_hit_tokens += cached_tokens

    async def _take(self, step: Step) -> None:
        """Compute the step and commit it. From here until it is committed no block is given back."""
        started = perf_counter()
        samplers = [row.sequence.samplers() if row.is_last else [] for row in step.rows]
        rows = [as_row(row, group) for row, group in zip(step.rows, samplers, strict=True)]
        self._record(step)
        self._is_in_flight = True
        try:
            if step.admitted:
                await asyncio.sleep(0)  # who waited for it goes on before the outputs of the step appear
            chosen = iter(await self._runner.run(rows) if rows else [])
        finally:
            self._is_in_flight = False
        outputs, self._ended = self._ended, []
        for row, ready, group in zip(step.rows, rows, samplers, strict=True):
            self._commit(row, ready.asked, [(sampler, next(chosen)) for sampler in group], outputs)
        for sequence in self._left:
            self._scheduler.release(sequence)
        self._left.clear()
        self.counters.times.add(perf_counter() - started)
        if outputs:
            self._unread.append(outputs)
            self._news.set()

    def _commit(
        self,
        row: ScheduledRow,
        asked: Asked | None,
        drawn: list[tuple[Sequence, Chosen]],
        outputs: list[LLMEngineOutput],
    ) -> None:
        """The row is computed: its blocks are known, its choices have their token, its followers what they waited for."""
        sequence = row.sequence
        if sequence.place is not Place.RUNNING:
            return  # it left while the step was computed
        self._count(row)
        before, sequence.computed = sequence.computed, row.start + row.count
        self._publish_blocks(sequence, before)
        job = self._jobs[sequence.request.request_id]
        drawn_outputs = [self._take_token(sampler, value) for sampler, value in drawn if sampler in job.sequences]
        is_over = sequence.to_export and (sequence.computed == sequence.length or bool(drawn))
        if sequence.scores is not None:
            if asked is not None:
                sequence.scores.take(asked)
            if drawn_outputs or is_over:
                drawn_outputs = with_prompt(drawn_outputs, sequence)
        if sequence.to_export:
            if is_over:
                self._end_prefill(job, sequence, drawn_outputs)
            return
        outputs += drawn_outputs
        ended = {output.choice for output in drawn_outputs if output.finish_reason is not None}
        ended_sequences = [other for other in job.sequences if other.choice in ended] if ended else []
        for follower in ended_sequences:
            if follower is not sequence:
                self.leave(job, follower)
        if sequence.followers and sequence.computed >= sequence.prompt_length:
            self._fork(sequence)
        if sequence in ended_sequences:
            self.leave(job, sequence)

    def _take_token(self, sequence: Sequence, value: Chosen) -> LLMEngineOutput:
        if isinstance(value, RowFailure):
            self._runner.clear(self._pool.forget(sequence.table))
            return output_of(sequence, [], FinishReason.ERROR, value.message)
        if sequence.request.stop_conditions.max_tokens == 0:  # the prompt is all that is asked for
            return output_of(sequence, [], FinishReason.LENGTH)
        token = value.token if isinstance(value, Scored) else value
        sequence.output.append(token)
        self.counters.output_tokens += 1
        output = output_of(sequence, [token], sequence.finish_reason(self._max_model_len))
        if isinstance(value, Scored):
            return msgspec.structs.replace(output, log_probs=[value.logprob], top_logprobs=[value.top])
        return output

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
        self.counters.recomputed_tokens += min(end, new) - row.start
        self.counters.prompt_tokens_computed += max(0, min(end, sequence.prompt_length) - new)
        sequence.reached = max(sequence.reached, end)

    def _record(self, step: Step) -> None:
        self.counters.preemptions += len(step.preempted)
        rows = [(row.sequence.request.request_id, row.sequence.choice, row.start, row.count) for row in step.rows]
        preempted = [(sequence.request.request_id, sequence.choice) for sequence in step.preempted]
        self.log.append(LoggedStep(self.counters.times.steps, rows, self._pool.used, preempted))

    def _give_back(self, sequence: Sequence) -> None:
        """Release the blocks, after the running step if there is one: it may be writing to them."""
        if self._is_in_flight:
            self._left.append(sequence)
        else:
            self._scheduler.release(sequence)
        self._work.set()

    def _die(self, error: Exception) -> None:
        self.death = EngineDied(f"step {self.counters.times.steps} failed: {type(error).__name__}: {error}")
        self.death.__cause__ = error
        for job in list(self._jobs.values()):
            for waiter in (job.joined, job.computed):
                if not waiter.done():
                    waiter.set_exception(self.death)
                    waiter.exception()  # not every waiter is waited for
        self._news.set()


def as_row(row: ScheduledRow, samplers: list[Sequence]) -> Row:
    """The row as the runner sees it."""
    sequence, end = row.sequence, row.start + row.count
    asked = sequence.scores.ask(row.start, end) if sequence.scores is not None else None
    draws = [sampler.draw() for sampler in samplers]
    return Row(sequence.tokens(row.start, end), row.start, sequence.table, draws, asked)


def with_prompt(outputs: list[LLMEngineOutput], sequence: Sequence) -> list[LLMEngineOutput]:
    """The first outputs of a request with what is to be told of its prompt. Where it had all of them before, one without tokens."""
    assert sequence.scores is not None
    records = sequence.scores.tell()
    if not records:
        return outputs
    first, *others = outputs or [output_of(sequence, [], None)]
    return [msgspec.structs.replace(first, prompt_logprobs=records), *others]
