"""The slots of an API key: one is taken by each request from its admission to its end, whatever that is and however often it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import KeyBusy
from pipeline.protocol import FinishReason, LLMEngineOutput, Log, Request
from pipeline.queue import Admission, Delivery, LaneLook, Limits, PoolQueue, StepItem
from tests.system import request

POOL, API, OWNER = "p", "api-1", "key-1"
LIMITS = Limits(max_waiting_tasks=999, max_waiting_tokens=999_999, deadline_s=60, result_ttl_s=60, max_held=1)


class Pool:
    """One pool, and one API key that may have one request in it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.queue = PoolQueue(connection, POOL)

    async def admit(self, *, owner: str = OWNER, deadline_s: float = 60.0, **fields: Any) -> Request:
        item = msgspec.structs.replace(request(3), owner=owner)
        limits = dataclasses.replace(LIMITS, deadline_s=deadline_s)
        for _ in range(2):  # as after a lost reply
            await self.queue.admit(Admission(item, "decode", "default", API, **fields), limits)
        return item

    async def claim(self) -> Delivery:
        delivery = await self.queue.claim(
            "decode", "w", [LaneLook("default", 9)], total_blocks=99, block_size=16, overtake_ms=1000
        )
        assert delivery is not None
        return delivery

    async def held(self, owner: str = OWNER) -> int:
        return int(await self.connection.command("SCARD", self.queue.keys.held(owner)))

    async def sweep(self) -> dict[str, int]:
        await self.connection.command("DEL", self.queue.keys.root + "sweeper")
        return await self.queue.sweep("s", interval_s=60, lease_s=30, max_attempts=1)


@pytest.fixture
async def pool(default_redis_url: str) -> AsyncIterator[Pool]:
    connection = Connection(RedisSettings(url=default_redis_url))
    yield Pool(connection)
    await connection.close()


async def _done(pool: Pool, item: Request) -> None:
    delivery = await pool.claim()
    last = LLMEngineOutput(item.id, 0, 0, [7], FinishReason.EOS)
    await pool.queue.step("w", [StepItem(item.id, API, delivery.epoch, last)])
    for _ in range(2):
        await pool.queue.end(item.id, "done", worker="w", epoch=delivery.epoch)


async def _failed(pool: Pool, item: Request) -> None:
    delivery = await pool.claim()
    await pool.queue.end(item.id, "failed", "test", worker="w", epoch=delivery.epoch)


async def _cancelled_waiting(pool: Pool, item: Request) -> None:
    for _ in range(2):
        await pool.queue.cancel(item.id, "test")


async def _cancelled_running(pool: Pool, item: Request) -> None:
    await pool.claim()
    await pool.queue.cancel(item.id, "test")


async def _expired(pool: Pool, item: Request) -> None:
    await pool.connection.command("ZADD", pool.queue.keys.deadlines(), 1, item.id)
    assert (await pool.sweep())["expired"] == 1


async def _dead(pool: Pool, item: Request) -> None:
    assert await pool.queue.hand_back(await pool.claim(), "w", counts=True, max_attempts=1, why="test") == "dead"


async def _dead_and_dropped(pool: Pool, item: Request) -> None:
    await _dead(pool, item)
    assert await pool.queue.drop(item.id, "1-1") == ""


async def _purged(pool: Pool, item: Request) -> None:
    assert await pool.queue.purge("decode", "default", cursor="-", last="+", nonce="n") == (1, "")


async def _unread(pool: Pool, item: Request) -> None:
    await pool.queue.linger(item.id, 0)
    assert (await pool.sweep())["cancelled"] == 1


async def _brought_back_and_done(pool: Pool, item: Request) -> None:
    await pool.claim()
    await pool.connection.command("FLUSHALL")
    sent = Log(tokens=[[7]], finished=[None])
    for _ in range(2):
        await pool.queue.restore(Admission(item, "decode", "default", API), LIMITS, sent)
    assert await pool.held() == 1
    delivery = await pool.claim()
    last = LLMEngineOutput(item.id, 0, 1, [8], FinishReason.EOS)
    await pool.queue.step("w", [StepItem(item.id, API, delivery.epoch, last)])
    await pool.queue.end(item.id, "done", worker="w", epoch=delivery.epoch)


ENDS: list[Callable[[Pool, Request], Awaitable[None]]] = [
    _done, _failed, _cancelled_waiting, _cancelled_running, _expired, _dead, _dead_and_dropped, _purged, _unread,
    _brought_back_and_done,
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.strip("_"))
async def test_a_request_gives_its_slot_back_when_it_ends(
    pool: Pool, end: Callable[[Pool, Request], Awaitable[None]]
) -> None:
    first = await pool.admit()
    assert await pool.held() == 1
    with pytest.raises(KeyBusy, match="has 1 requests"):
        await pool.admit()
    await end(pool, first)
    assert await pool.held() == 0
    await pool.admit()
    assert await pool.held() == 1


async def test_a_request_that_waits_again_keeps_its_slot(pool: Pool) -> None:
    await pool.admit()
    await pool.queue.hand_back(await pool.claim(), "w", counts=True, max_attempts=3, why="test", delay_s=60)
    with pytest.raises(KeyBusy):
        await pool.admit()
    assert await pool.held() == 1


async def test_keys_do_not_take_the_slots_of_one_another(pool: Pool) -> None:
    for owner in ("key-1", "key-2"):
        await pool.admit(owner=owner)
        assert await pool.held(owner) == 1
    for _ in range(3):
        await pool.admit(owner="")  # nobody's: no key, no limit, no slot
    assert await pool.held("") == 0


async def test_what_is_refused_takes_no_slot(pool: Pool) -> None:
    await pool.admit()
    for _ in range(3):
        with pytest.raises(KeyBusy):
            await pool.admit()
    assert await pool.held() == 1
    assert await pool.connection.command("HGET", pool.queue.keys.counters(), "admitted") == b"1"


async def test_the_same_request_again_is_read_and_not_refused(pool: Pool) -> None:
    first = await pool.admit(idempotency_key="k", digest="d")
    again = msgspec.structs.replace(request(3), owner=OWNER)
    admission = Admission(again, "decode", "default", API, idempotency_key="k", digest="d")
    assert await pool.queue.admit(admission, LIMITS) == first.id
    assert await pool.held() == 1


async def test_a_slot_that_an_older_version_did_not_give_back_is_found(pool: Pool) -> None:
    """Its processes end requests without knowing of slots."""
    held = pool.queue.keys.held(OWNER)
    ended = await pool.admit()
    await pool.queue.cancel(ended.id, "test")
    await pool.connection.command("SADD", held, ended.id, f"{POOL}-gone-for-long")
    await pool.admit()
    assert await pool.held() == 1
