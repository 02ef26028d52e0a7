"""What prefix caches hold, in the pool's stream: numbered by worker, bounded, and a gap where something could not be told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.keys import PoolKeys
from pipeline.kv_events import FIELD, BlocksCleared, BlocksRemoved, BlocksStored, KVEvent, KVEvents, decode
from pipeline.protocol import pack_tokens
from workers.kv_events import MOST_IN_ENTRY, MOST_WAITING, KVEventWriter

POOL = "caches"
STORED = BlocksStored([1, 2**64 - 1], None, pack_tokens(range(32)), 16, "story", "salt")


class Told:
    """The part of an engine that is read here: it tells what it is given."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[KVEvent]] = asyncio.Queue()

    async def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        while True:
            yield await self.queue.get()


async def entries(connection: Connection, least: int) -> list[KVEvents]:
    """All entries, once they hold so many events."""
    async with asyncio.timeout(20):
        while True:
            rows = await connection.command("XRANGE", PoolKeys(POOL).kv_events(), "-", "+")
            found = [decode(fields[FIELD.encode()]) for _, fields in rows]
            if sum(len(entry.events) for entry in found if entry is not None) >= least:
                return [entry for entry in found if entry is not None]
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def writing(connection: Connection, worker: str) -> AsyncIterator[tuple[KVEventWriter, Told]]:
    told, writer = Told(), KVEventWriter(connection, POOL, worker)
    running = asyncio.create_task(writer.run(told))  # type: ignore[arg-type]
    try:
        yield writer, told
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_events_of_each_worker_come_in_order_and_without_a_gap(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    async with writing(connection, "a") as (_, a), writing(connection, "b") as (_, b):
        for told in (a, b):
            told.queue.put_nowait([BlocksCleared()])
            told.queue.put_nowait([STORED, BlocksRemoved([1])])
        found = await entries(connection, 6)
    for worker in ("a", "b"):
        own = [entry for entry in found if entry.worker == worker]
        assert [event for entry in own for event in entry.events] == [BlocksCleared(), STORED, BlocksRemoved([1])]
        assert [entry.number for entry in own] == [sum(len(e.events) for e in own[:at]) for at in range(len(own))]
    await connection.close()


async def test_what_could_not_be_told_is_a_gap_in_the_numbers(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    async with writing(connection, "a") as (writer, _):
        writer.put([BlocksRemoved([number]) for number in range(MOST_WAITING + 7)])
        found = await entries(connection, MOST_WAITING)
    assert [entry.number for entry in found] == list(range(7, MOST_WAITING + 7, MOST_IN_ENTRY))
    assert found[0].events[0] == BlocksRemoved([7])
    await connection.close()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\xacother.v1\x01\x02"])
def test_what_cannot_be_read_is_a_gap(data: bytes) -> None:
    assert decode(data) is None
