"""What the worker's parent process and its engine child say to each other: length-prefixed msgpack over a socket pair."""

from __future__ import annotations

import asyncio

import msgspec

from pipeline.config import EngineSettings, PoolSettings, TransferSettings
from pipeline.kv_events import KVEvent
from pipeline.protocol import BackendInput, KVHandle, LLMEngineOutput, Log
from workers.engine import EngineInfo, EngineStats, Prefilled

MAX_MESSAGE_BYTES = 256 * 1024 * 1024


class Start(msgspec.Struct, tag="start", frozen=True):
    """First message to the child: what it is."""

    owner: str
    pool: PoolSettings
    engine: EngineSettings
    transfer: TransferSettings
    exports: bool
    embeds: bool = False  # an embedding engine is wanted


class Prefill(msgspec.Struct, tag="prefill", frozen=True):
    """Run `AsyncEngine.prefill`."""

    call: int
    request: BackendInput
    done: Log


class Decode(msgspec.Struct, tag="decode", frozen=True):
    """Run `AsyncEngine.decode`."""

    call: int
    request: BackendInput
    kv: KVHandle | None
    done: Log


class Embed(msgspec.Struct, tag="embed", frozen=True):
    """Run `EmbeddingEngine.embed`."""

    call: int
    request_id: str
    sequences: list[list[int]]
    dimensions: int | None


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Run `AsyncEngine.cancel`; no answer."""

    request_id: str
    choice: int | None


class Release(msgspec.Struct, tag="release", frozen=True):
    """Run `AsyncEngine.release`; no answer."""

    handle_id: str


class Close(msgspec.Struct, tag="close", frozen=True):
    """Close the engine and exit."""


ToChild = Start | Prefill | Decode | Embed | Cancel | Release | Close


class Started(msgspec.Struct, tag="started", frozen=True):
    """The engine is up. `stats`: what the worker says of itself from its first word on, such as its room for handles."""

    info: EngineInfo
    stats: EngineStats


class PrefillAnswer(msgspec.Struct, tag="prefilled", frozen=True):
    """Answer to `Prefill`."""

    call: int
    prefilled: Prefilled


class DecodeAnswer(msgspec.Struct, tag="decoding", frozen=True):
    """Answer to `Decode`: it has joined the batch."""

    call: int
    cached_tokens: int


class EmbedAnswer(msgspec.Struct, tag="embedded", frozen=True):
    """Answer to `Embed`."""

    call: int
    vectors: list[bytes]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Answer to a call that raised: the class's name in `pipeline.errors`, its message and `KVLost.reason`. Call 0: start."""

    call: int
    error: str
    message: str
    reason: str


class Step(msgspec.Struct, tag="step", frozen=True):
    """The outputs of one step."""

    outputs: list[LLMEngineOutput]


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """The engine's figures; also the sign that the child's event loop runs."""

    stats: EngineStats


class CacheNews(msgspec.Struct, tag="kv", frozen=True):
    """What the engine's prefix cache got and lost."""

    events: list[KVEvent]


CallAnswer = PrefillAnswer | DecodeAnswer | EmbedAnswer
FromChild = Started | CallAnswer | Failed | Step | Stats | CacheNews

_encode = msgspec.msgpack.Encoder().encode


def send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    """Queue one message; the caller drains where it may wait."""
    data = _encode(message)
    writer.write(len(data).to_bytes(4, "little") + data)


async def receive(reader: asyncio.StreamReader) -> bytes:
    """The bytes of the next message. Raises `asyncio.IncompleteReadError` when the other side is gone."""
    size = int.from_bytes(await reader.readexactly(4), "little")
    return await reader.readexactly(size)
