"""The engines that the contract suite runs against, small enough for a laptop, and a reader of their steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import EngineSettings, MockSettings, PoolSettings, TorchSettings, TransferSettings
from pipeline.protocol import (
    BackendInput,
    FinishReason,
    LLMEngineOutput,
    Log,
    OutputOptions,
    SamplingOptions,
    StopConditions,
)
from workers.engine import load_engine
from workers.engines.paged.engine import PagedEngine
from workers.transfers.block_transfer import BlockTransfer

VOCABULARY = 256
BLOCK = 16


def write_model(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """A small random decoder of a family of Hugging Face models, saved once."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,  # wide enough that the best logits are far apart
        **fields,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def require_cuda() -> None:
    """Skip the test, with the reason, where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


class Engines:
    """Makes engines of one kind (`mock`, `torch`, `torch-cuda`) over one model and one shared-memory folder."""

    def __init__(self, kind: str, model: str, place: Path) -> None:
        self.kind, _, device = kind.partition("-")
        self._device = device or "cpu"
        self.model = model
        self._place = place
        self._count = 0

    @asynccontextmanager
    async def engine(self, **fields: Any) -> AsyncIterator[Running]:
        """A started engine; `fields` are those that both sections of settings have."""
        section = EngineSettings(
            torch=TorchSettings(**{"num_blocks": 256, "device": self._device, "dtype": "float32", **fields}),
            mock=MockSettings(
                **{
                    "num_blocks": 256,
                    "max_num_seqs": 64,
                    "max_num_batched_tokens": 512,
                    "vocab_size": VOCABULARY,
                    "block_nbytes": 1024,
                    "max_model_len": 2048,
                    "prefill_base_ms": 0,
                    "prefill_token_ms": 0,
                    "decode_base_ms": 0,
                    "decode_seq_ms": 0,
                    **fields,
                }
            ),
        )
        transfer = TransferSettings(dir=str(self._place), arena_bytes=2**25, slab_bytes=2**16, verify=True)
        pool = PoolSettings(model=self.model, engine=self.kind)  # type: ignore[arg-type]
        self._count += 1
        engine = load_engine(pool, section, BlockTransfer(transfer, f"engine{self._count}"))
        assert isinstance(engine, PagedEngine)
        await engine.start()
        running = Running(engine)
        try:
            yield running
        finally:
            await engine.close()
            await running.reading


class Running:
    """An engine and what came out of it: the tokens and the end of each choice, by (request id, choice)."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.outputs: list[LLMEngineOutput] = []
        self._changed = asyncio.Condition()
        self._has_ended = False
        self.reading = asyncio.create_task(self._read())

    async def generate(self, *requests: BackendInput) -> list[list[list[int]]]:
        """All of them at once, prefilled locally: the tokens of each choice of each request."""
        for request in requests:
            await self.engine.decode(request, None, Log.empty(request.sampling_options.n))
        return [await self.finished(request) for request in requests]

    async def finished(self, request: BackendInput) -> list[list[int]]:
        """The tokens of each choice, once all have ended."""
        keys = [(request.request_id, choice) for choice in range(request.sampling_options.n)]
        await self.until(lambda: all(key in self.ends for key in keys))
        return [self.tokens.get(key, []) for key in keys]

    async def until(self, condition: Any) -> None:
        """Wait until an output makes the condition true; an engine that dies meanwhile fails the test."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_ended or condition())
        if not condition():
            await self.reading
            raise AssertionError("the engine was closed")

    async def take_over(self, other: Running, request: BackendInput) -> list[list[int]]:
        """Prefill on the other engine, decode on this one: the tokens of each choice."""
        n = request.sampling_options.n
        prefilled = await other.engine.prefill(request, Log.empty(n))
        log = Log.empty(n)
        self.outputs += prefilled.outputs
        for output in prefilled.outputs:
            log.tokens[output.choice].extend(output.token_ids)
            log.finished[output.choice] = output.finish_reason
        if prefilled.kv is None:
            return log.tokens
        assert await self.engine.decode(request, prefilled.kv, log) == len(request.token_ids)
        await other.engine.release(prefilled.kv.id)
        await self.until(lambda: all(end or (request.request_id, c) in self.ends for c, end in enumerate(log.finished)))
        return [first + self.tokens.get((request.request_id, choice), []) for choice, first in enumerate(log.tokens)]

    async def _read(self) -> None:
        try:
            async for outputs in self.engine.steps():
                async with self._changed:
                    for output in outputs:
                        key = output.request_id, output.choice
                        self.outputs.append(output)
                        self.tokens.setdefault(key, []).extend(output.token_ids)
                        if output.finish_reason is not None:
                            self.ends[key] = output.finish_reason
                    self._changed.notify_all()
        finally:
            async with self._changed:
                self._has_ended = True
                self._changed.notify_all()


def request_of(request_id: str, token_ids: Sequence[int], max_tokens: int = 12, **sampling: Any) -> BackendInput:
    """Greedy unless told otherwise."""
    return BackendInput(
        request_id=request_id,
        model="m",
        token_ids=list(token_ids),
        stop_conditions=StopConditions(max_tokens=max_tokens),
        sampling_options=SamplingOptions(**{"temperature": 0.0, **sampling}),
    )


def stopping(request: BackendInput, **stop: Any) -> BackendInput:
    """The same request with other stop conditions."""
    return msgspec.structs.replace(request, stop_conditions=msgspec.structs.replace(request.stop_conditions, **stop))


def with_output(request: BackendInput, **output: Any) -> BackendInput:
    """The same request with other output options."""
    return msgspec.structs.replace(request, output_options=OutputOptions(**output))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that look random; different seeds share no first block."""
    return [(seed * 7919 + position * (2 * seed + 31) + position * position) % VOCABULARY for position in range(length)]
