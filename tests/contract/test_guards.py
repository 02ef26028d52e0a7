"""The guards of the scripts, one by one: each test fails when its guard is taken out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.protocol import CancelNote, FreeNote, KVHandle, LLMEngineOutput, Note
from pipeline.queue import Delivery, Limits, PoolQueue, StepItem, Verdict
from tests.system import request

POOL, API = "p", "api-1"
LIMITS = Limits(max_waiting_tasks=9, max_waiting_tokens=9000, deadline_s=60, result_ttl_s=60)


class Pool:
    """One pool and the calls of its processes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.queue = PoolQueue(connection, POOL)
        self.keys = self.queue.keys

    async def admit(self, stage: str, blocks: int = 2) -> str:
        item = request(3)
        return await self.queue.admit(item, stage=stage, lane="default", blocks=blocks, api=API, limits=LIMITS)

    async def claim(self, stage: str, worker: str, overtake_ms: int = 1000) -> Delivery | None:
        return await self.queue.claim(
            stage, worker, ["default"], free_blocks=9, total_blocks=99, overtake_ms=overtake_ms
        )

    async def claimed(self, stage: str, worker: str = "w") -> Delivery:
        await self.admit(stage)
        delivery = await self.claim(stage, worker)
        assert delivery is not None
        return delivery

    async def of(self, delivery: Delivery, field: str) -> bytes:
        return bytes(await self.connection.command("HGET", self.keys.request(delivery.id), field))

    async def age(self, delivery: Delivery, consumer: str) -> None:
        """As if nobody had renewed it for a minute."""
        lane, entry = self.keys.lane(delivery.stage, "default"), await self.of(delivery, "entry")
        claim = "return redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], 0, ARGV[2], 'IDLE', 60000, 'JUSTID')"
        await self.connection.command("EVAL", claim, 1, lane, consumer, entry)

    async def let_expire(self, delivery: Delivery) -> None:
        await self.connection.command("HSET", self.keys.request(delivery.id), "deadline", 1)

    async def sweep(self) -> dict[str, int]:
        await self.connection.command("DEL", self.keys.root + "sweep")
        return await self.queue.sweep("s", interval_s=60, lease_s=30, max_attempts=3)


@pytest.fixture
async def pool(default_redis_url: str) -> AsyncIterator[Pool]:
    connection = Connection(RedisSettings(url=default_redis_url))
    yield Pool(connection)
    await connection.close()


async def test_only_its_owner_hands_over(pool: Pool) -> None:
    delivery = await pool.claimed("prefill")
    outputs = [LLMEngineOutput(delivery.id, 0, 0, [7])]
    verdict, _ = await pool.queue.handover(delivery, "other", outputs, None, cached_tokens=0)
    assert verdict is Verdict.FENCED


async def test_a_repeated_fetched_counts_once(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    for _ in range(2):
        assert await pool.queue.fetched(delivery, "w", recomputed="gone") is Verdict.ACCEPTED
    assert await pool.connection.command("HGET", pool.keys.counters(), "kv_recomputed:gone") == b"1"


async def test_a_lease_is_renewed_for_the_delivery_that_is_named(pool: Pool) -> None:
    first = await pool.claimed("decode")
    assert await pool.queue.hand_back(first, "w", counts=False, max_attempts=3, why="test") == "parked"
    second = await pool.claim("decode", "w")
    assert second is not None
    held = [(first.id, first.epoch), (second.id, second.epoch)]
    assert await pool.queue.renew("decode", "w", b"", 30, held) == [False, True]


async def test_a_lease_that_is_renewed_does_not_run_out(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.age(delivery, "w")
    await pool.queue.renew("decode", "w", b"", 30, [(delivery.id, delivery.epoch)])
    assert (await pool.sweep())["parked"] == 0
    await pool.age(delivery, "w")
    assert (await pool.sweep())["parked"] == 1


async def test_a_parked_task_waits_as_long_as_it_takes(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.queue.hand_back(delivery, "w", counts=False, max_attempts=3, why="test")
    await pool.age(delivery, "-")
    assert not any((await pool.sweep()).values())
    assert await pool.claim("decode", "w") is not None


async def test_what_does_not_fit_is_not_overtaken_for_ever(pool: Pool) -> None:
    await pool.admit("decode", blocks=50)
    small = await pool.admit("decode", blocks=2)
    assert await pool.claim("decode", "w", overtake_ms=-1) is None
    delivery = await pool.claim("decode", "w", overtake_ms=60_000)
    assert delivery is not None
    assert delivery.id == small


async def test_nothing_is_written_after_the_deadline(pool: Pool) -> None:
    decoding = await pool.claimed("decode")
    await pool.let_expire(decoding)
    output = LLMEngineOutput(decoding.id, 0, 0, [7])
    assert await pool.queue.step([StepItem(decoding.id, API, decoding.epoch, output)]) == [Verdict.ENDED]
    prefilling = await pool.claimed("prefill")
    await pool.let_expire(prefilling)
    outputs = [LLMEngineOutput(prefilling.id, 0, 0, [7])]
    assert await pool.queue.handover(prefilling, "w", outputs, None, cached_tokens=0) == (Verdict.ENDED, "expired")
    for delivery in (decoding, prefilling):
        assert await pool.of(delivery, "state") == b"expired"
        assert await pool.connection.command("STRLEN", pool.keys.log(delivery.id, 0)) == 0


async def test_a_purge_leaves_what_came_after_it_began(pool: Pool) -> None:
    first, second = await pool.admit("decode"), await pool.admit("decode")
    entry = bytes(await pool.connection.command("HGET", pool.keys.request(first), "entry")).decode()
    assert await pool.queue.purge("decode", "default", cursor="-", last=entry, nonce="a") == (1, "")
    states = [await pool.connection.command("HGET", pool.keys.request(name), "state") for name in (first, second)]
    assert states == [b"cancelled", b"queued"]


async def test_a_purge_counts_only_what_it_ended_itself(pool: Pool) -> None:
    for _ in range(3):
        await pool.admit("decode")
    count, cursor = await pool.queue.purge("decode", "default", cursor="-", last="+", nonce="a", limit=2)
    assert count == 2
    assert await pool.queue.purge("decode", "default", cursor="-", last="+", nonce="b") == (1, "")
    assert await pool.queue.purge("decode", "default", cursor=cursor, last="+", nonce="a", limit=2) == (0, "")


async def test_what_is_not_dead_is_not_dropped(pool: Pool) -> None:
    request_id = await pool.admit("decode")
    assert await pool.queue.drop(request_id, "1-1") == "queued"
    assert await pool.connection.command("EXISTS", pool.keys.request(request_id)) == 1


async def test_an_end_tells_the_worker_that_runs_it_and_the_owner_of_the_blocks(pool: Pool) -> None:
    delivery = await pool.claimed("prefill", "p")
    kv = KVHandle(
        id="h", request_id=delivery.id, owner="p", transfer="shm", layout="x", num_tokens=3, num_blocks=1, nbytes=8
    )
    await pool.queue.handover(delivery, "p", [LLMEngineOutput(delivery.id, 0, 0, [7])], kv, cached_tokens=0)
    running = await pool.claim("decode", "d")
    assert running is not None
    subscription = await pool.connection.subscribe(pool.keys.control("d"), pool.keys.control("p"))
    messages = subscription.messages()
    await pool.queue.cancel(delivery.id, "test")
    async with asyncio.timeout(5):
        notes = [msgspec.msgpack.decode((await anext(messages))[1] or b"", type=Note) for _ in range(2)]
    assert notes == [CancelNote(delivery.id, running.epoch), FreeNote("h")]
    await messages.aclose()
