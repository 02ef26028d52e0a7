"""The contract of an engine: token ids in, token ids out. No text, no HTTP, no Redis; batching lives inside.

Life of a request in a pair of engines:
1. the prefill engine computes the prompt's keys and values, samples what each choice's log lacks (the first token) and
   exports the blocks: `prefill` returns `Prefilled`;
2. the decode engine fetches the blocks behind the handle and joins the running batch: `decode` returns once it has joined
   (from then on the handle is not needed) or raises `KVLost`;
3. every step's outputs of all requests come as one list from `steps`;
4. the owner of the handle is told to `release` it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import msgspec

from pipeline.config import EngineSettings, PoolSettings
from pipeline.errors import ConfigError
from pipeline.kv_events import KVEvent
from pipeline.protocol import BackendInput, KVHandle, LLMEngineOutput, Log
from workers.transfer import Fetched, Transfer


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is, fixed once it has started."""

    name: str  # "torch", "mock", ...
    model: str
    layout: str  # fingerprint of the KV layout: handles of another one are refused
    block_size: int  # tokens a block
    num_blocks: int  # capacity in blocks
    block_nbytes: int
    max_model_len: int  # prompt and output, tokens
    max_num_seqs: int  # choices that run at once
    max_num_batched_tokens: int  # tokens of one step


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of an engine. Counters only grow; `steps` moving shows that it lives."""

    running: int = 0  # choices in the batch
    waiting: int = 0
    blocks_used: int = 0
    blocks_free: int = 0  # free now or by eviction from the prefix cache
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    prompt_tokens_computed: int = 0  # for the first time here
    recomputed_tokens: int = 0  # prompt and output tokens computed again after a preemption
    output_tokens: int = 0
    preemptions: int = 0
    handles_exported: int = 0  # handles not yet released
    handle_bytes: int = 0
    handle_bytes_free: int = 0
    fetched: dict[str, Fetched] = {}  # blocks that came in, by the way they came
    steps: int = 0
    busy_s: float = 0.0  # in steps, as a counter: idleness between them is none of it
    step_ms: float = 0.0  # moving average


class Prefilled(msgspec.Struct, frozen=True, kw_only=True):
    """What prefill gives: the first outputs of each choice that lacked one, and where the blocks are.

    `kv` is None when every choice ended with its first token: nothing is left to decode and nothing was exported.
    """

    outputs: list[LLMEngineOutput]
    kv: KVHandle | None
    cached_tokens: int  # prompt tokens served from the prefix cache


class BaseEngine(Protocol):
    """What every engine has, whatever it computes. Request ids are unique among the requests that an engine holds."""

    @property
    def info(self) -> EngineInfo:
        """Known after `start`."""
        ...

    async def start(self) -> None:
        """Load the model, take the memory. Raises `Unservable` naming why, before any request is taken."""
        ...

    def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """All outputs of a step as one list, in the order of steps; ends when the engine is closed."""
        ...

    def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        """What the prefix cache got and lost, in order, beginning with `BlocksCleared`. An engine that does not tell ends it at once,
        others when they are closed. One reader."""
        ...

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Stop a request (or one choice of it) and free its blocks. Unknown ids are ignored; nothing of it appears in later steps."""
        ...

    async def release(self, handle_id: str) -> None:
        """Free what `prefill` exported under this id. Unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """The engine's figures now; never blocks."""
        ...

    async def close(self) -> None:
        """Stop and give back all memory, shared memory included. May be called twice."""
        ...


class AsyncEngine(BaseEngine, Protocol):
    """An engine that generates; see the module's docstring."""

    async def prefill(self, request: BackendInput, done: Log) -> Prefilled:
        """Compute the prompt and sample the first token of each choice whose log is empty; export the blocks.

        Raises `Unservable` when the request cannot fit this engine at all, `asyncio.CancelledError` when cancelled.
        """
        ...

    async def decode(self, request: BackendInput, kv: KVHandle | None, done: Log) -> int:
        """Join the batch; returns the number of prompt tokens that were not computed here (from cache or handle).

        With `kv` the blocks are fetched first; raises `KVLost` where they are not what the handle says, and the caller
        decides. With `kv=None` prompt and logged tokens are computed here, in chunks. Choices whose log is finished
        are left out. Returns before the first step's output of this request appears in `steps`.
        """
        ...


@runtime_checkable
class EmbeddingEngine(BaseEngine, Protocol):
    """An engine that makes vectors of token sequences. It has no steps with outputs, and keeps nothing of a request."""

    async def embed(self, request_id: str, sequences: list[list[int]], dimensions: int | None) -> list[bytes]:
        """The vector of each sequence, as little-endian float32; of `dimensions` numbers where that is given.

        Raises `EngineError` where a batch failed, `asyncio.CancelledError` when cancelled.
        """
        ...


class EngineFactory(Protocol):
    """What a module of `workers.engines` offers as `create_engine`."""

    def __call__(self, pool: PoolSettings, engine: EngineSettings, transfer: Transfer) -> AsyncEngine:
        """An engine that has not started; it starts and closes the transfer."""
        ...


def load_engine(pool: PoolSettings, engine: EngineSettings, transfer: Transfer) -> AsyncEngine:
    """The engine that the pool names, not yet started. Only its own module is imported, so torch costs nobody else."""
    modules = {
        "torch": "workers.engines.torch.engine",
        "vllm": "workers.engines.vllm.engine",
        "mock": "workers.engines.mock",
    }
    if pool.engine not in modules:
        raise ConfigError(f"pools.<name>.engine: {pool.engine!r} is none of {', '.join(modules)}")
    create = cast(EngineFactory, import_module(modules[pool.engine]).create_engine)
    return create(pool, engine, transfer)


def load_embedding_engine(pool: PoolSettings, engine: EngineSettings) -> EmbeddingEngine:
    """The engine that makes this pool's vectors, not yet started. Raises `ConfigError` where its engine makes none."""
    modules = {"torch": "workers.engines.torch.embedder"}
    if pool.engine not in modules:
        raise ConfigError(
            f"pools.<name>.engine: {pool.engine!r} makes no embeddings, only {', '.join(modules)} does: "
            "set pools.<name>.embeddings to false, or serve the model in a pool with that engine"
        )
    create = import_module(modules[pool.engine]).create_embedding_engine
    return cast(EmbeddingEngine, create(pool, engine))
