"""Opens the pools that a process serves: tokenizer, limits, client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping

import msgspec

from pipeline.client import PoolClient
from pipeline.config import EngineSettings, MockSettings, PoolSettings, Settings, VllmSettings
from pipeline.connection import Connection
from pipeline.embeddings import Offer, offer_of
from pipeline.errors import ConfigError, ModelNotFound
from pipeline.features import LOGPROBS, is_served
from pipeline.loras import loras_of
from pipeline.preprocess import Preprocessor
from pipeline.tokenizer import NoTokenizer, Tokenizer


class _Sequences(msgspec.Struct):
    """Of `engine.vllm.args`."""

    max_num_seqs: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ServedPool:
    """One pool as this process serves it; its name is the model's id."""

    name: str
    preprocessor: Preprocessor
    client: PoolClient
    created_s: int
    engine: str = "torch"  # what its workers run: not every engine serves everything
    embeddings: Offer | None = None  # what it gives at /v1/embeddings; None: nothing
    loras: tuple[str, ...] = ()  # adapters of its model, each a model of its own to clients


def pool_of(pools: Mapping[str, ServedPool], model: str) -> ServedPool:
    """The pool that serves a model id: its own name, or that of an adapter. Raises ModelNotFound."""
    pool = pools.get(model) or next((pool for pool in pools.values() if model in pool.loras), None)
    if pool is None:
        raise ModelNotFound(f"model {model[:100]!r} does not exist; see /v1/models", param="model")
    return pool


@contextlib.asynccontextmanager
async def open_pool(name: str, settings: Settings, connection: Connection, process: str) -> AsyncIterator[ServedPool]:
    """The pool `name` of `settings`, its client named `process`. Raises ConfigError and RedisUnavailable."""
    pool = settings.pools[name]
    loras = tuple(loras_of(pool))
    tokenizer = await asyncio.to_thread(load_tokenizer, pool)
    preprocessor = Preprocessor(
        tokenizer,
        model=name,
        max_model_len=max_model_len(name, pool, settings.engine, tokenizer.max_model_len),
        default_max_tokens=settings.api.default_max_tokens,
        max_choices=max_choices(pool, settings.engine),
    )
    async with PoolClient(
        connection,
        name,
        process,
        queue=settings.queue,
        router=settings.router,
        worker=settings.worker,
        buffer_items=settings.api.stream_buffer_items,
        silence_s=settings.api.silence_s,
    ) as client:
        embeddings = offer_of(pool, settings.queue, tokenizer.hidden_size)
        yield ServedPool(name, preprocessor, client, int(time.time()), pool.engine, embeddings, loras)


def load_tokenizer(pool: PoolSettings) -> Tokenizer | NoTokenizer:
    """A tokenizer that is ready: what it makes on first use is made, so that no request waits for it."""
    if not pool.has_tokenizer:
        return NoTokenizer.load(pool.model)
    tokenizer = Tokenizer.load(pool.tokenizer_source, response_template=pool.response_template)
    tokenizer.token_bytes(skip_special_tokens=True)
    if is_served(pool.engine, LOGPROBS):  # they show special tokens, too
        tokenizer.token_bytes(skip_special_tokens=False)
    return tokenizer


def max_model_len(name: str, pool: PoolSettings, engine: EngineSettings, model_says: int | None) -> int:
    """Prompt and output tokens together, at most: what is set, bounded by what the model and an engine's blocks can."""
    section = engine.of(pool.engine)
    context = section.max_model_len if isinstance(section, MockSettings) else model_says
    known = [limit for limit in (context, pool.max_model_len) if limit]
    if not known:
        raise ConfigError(f"pools.{name}.max_model_len: the model {pool.model!r} does not say its context, so set it")
    if not isinstance(section, VllmSettings):  # vLLM counts its blocks when it starts
        known.append(section.num_blocks * section.block_size)
    return min(known)


def max_choices(pool: PoolSettings, engine: EngineSettings) -> int:
    """Answers to one prompt, at most: as many as the engine runs at once. vLLM's own arguments win over its section."""
    section = engine.of(pool.engine)
    own = section.args if isinstance(section, VllmSettings) else ""
    try:
        return msgspec.json.decode(own or "{}", type=_Sequences).max_num_seqs or section.max_num_seqs
    except msgspec.DecodeError:  # workers say so, and do not start
        return section.max_num_seqs
