"""The guards of the scripts, one by one: each test fails when its guard is taken out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.protocol import (
    CancelNote,
    EndItem,
    FinishReason,
    Frame,
    FreeNote,
    KVHandle,
    LLMEngineOutput,
    Log,
    Note,
    Request,
    TaskCall,
    no_input,
)
from pipeline.queue import Admission, Delivery, LaneLook, Limits, PoolQueue, Restored, StepItem, Verdict
from tests.system import request

POOL, API = "p", "api-1"
LIMITS = Limits(max_waiting_tasks=999, max_waiting_tokens=999_999, deadline_s=60, result_ttl_s=60)


# Gives every delayed entry to the consumer of parked ones, as if it had been idle for long.
PARK_ALL = """
for _, p in ipairs(redis.call('XPENDING', KEYS[1], 'workers', '-', '+', 1000, '~')) do
  redis.call('XCLAIM', KEYS[1], 'workers', '-', 0, p[1], 'IDLE', 60000, 'JUSTID')
end
"""


class Pool:
    """One pool and the calls of its processes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.queue = PoolQueue(connection, POOL)
        self.keys = self.queue.keys

    async def admit(self, stage: str, blocks: int = 2, lane: str = "default", **fields: Any) -> str:
        item = request(16 * (blocks - 2) + 3)
        return await self.queue.admit(Admission(item, stage, lane, API, priority=lane, **fields), LIMITS)

    async def claim(
        self, stage: str, worker: str, *looks: LaneLook, overtake_ms: int = 1000, held: int = 0, guard_ms: int = 0
    ) -> Delivery | None:  # fmt: skip
        return await self.queue.claim(
            stage, worker, looks or [LaneLook("default", 9)], total_blocks=99, block_size=16, overtake_ms=overtake_ms, held=held,
            guard_ms=guard_ms,
        )  # fmt: skip

    async def retry(self, delivery: Delivery, worker: str = "w", **fields: Any) -> str:
        return await self.queue.hand_back(delivery, worker, counts=True, max_attempts=3, why="test", **fields)

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

    async def sweep(self, lease_s: float = 30) -> dict[str, int]:
        await self.connection.command("DEL", self.keys.root + "sweeper")
        return await self.queue.sweep("s", interval_s=60, lease_s=lease_s, max_attempts=3)

    async def miss_sweeps(self, seconds: int) -> None:
        """As if Redis had been away: nobody swept for so long."""
        last = int(await self.connection.command("HGET", self.keys.root + "swept", "last"))
        await self.connection.command("HSET", self.keys.root + "swept", "last", last - 1000 * seconds)

    async def make_due(self, request_id: str) -> None:
        """As if the delay were over."""
        assert await self.connection.command("ZADD", self.keys.delayed(), "XX", "CH", 1, request_id) == 1

    async def state(self, request_id: str) -> str:
        standing = await self.queue.attach(request_id, watch=False)
        return standing.state if standing else "unknown"

    async def api_is(self, name: str, expiry_ms: int) -> None:
        await self.connection.command("ZADD", self.keys.alive("api"), expiry_ms, name)


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
    assert await pool.queue.step("w", [StepItem(decoding.id, API, decoding.epoch, output)]) == [Verdict.ENDED]
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


async def test_what_was_erased_is_not_restored_and_its_key_is_free(pool: Pool) -> None:
    item = request(3)
    admission = Admission(item, "decode", "default", API, idempotency_key="k", digest="d")
    await pool.queue.admit(admission, LIMITS)
    assert await pool.queue.erase(item.id) == ("kept", "queued")
    await pool.queue.cancel(item.id, "test")
    assert await pool.queue.erase(item.id) == ("erased", "cancelled")
    sent = Log(tokens=[[5, 6]], finished=[None])
    assert await pool.queue.restore(admission, LIMITS, sent) == Restored("cancelled")
    found = await pool.queue.attach(item.id, watch=True, with_request=True)
    assert found is not None
    assert (found.request, found.log.tokens) == (None, [[]])
    assert 0 < await pool.connection.command("TTL", pool.keys.request(item.id)) <= LIMITS.result_ttl_s
    other = request(3)
    again = Admission(other, "decode", "default", API, idempotency_key="k", digest="other")
    assert await pool.queue.admit(again, LIMITS) == other.id


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


async def test_for_one_lease_after_a_gap_nothing_is_taken_from_anybody(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    assert (await pool.sweep())["held_back"] == 0
    await pool.age(delivery, "w")
    await pool.miss_sweeps(300)
    assert (await pool.sweep())["held_back"] == 1
    assert (await pool.sweep())["parked"] == 0
    assert await pool.queue.renew("decode", "w", b"", 30, [(delivery.id, delivery.epoch)]) == [True]
    await pool.age(delivery, "w")
    await pool.connection.command("HSET", pool.keys.root + "swept", "hold_until", 1)  # the lease is over
    assert (await pool.sweep())["parked"] == 1


async def test_after_a_gap_tasks_stay_with_prefill_and_apis_keep_their_requests(pool: Pool) -> None:
    waiting = await pool.admit("prefill", linger_s=0.0)
    await pool.queue.renew("decode", "d", b"", 30)
    await pool.queue.renew("prefill", "p", b"", 30)
    await pool.sweep(lease_s=60 * 60)
    await pool.miss_sweeps(3000)
    await pool.connection.command("ZADD", pool.keys.alive("prefill"), 1, "p")  # they could not renew
    await pool.api_is(API, 1)
    done = await pool.sweep(lease_s=60 * 60)
    assert (done["moved"], done["cancelled"], await pool.state(waiting)) == (0, 0, "queued")


async def test_a_retry_waits_for_its_time_and_keeps_its_place(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    later = await pool.admit("decode")
    for _ in range(2):
        assert await pool.retry(delivery, delay_s=60) == "parked"
    assert (await pool.sweep())["resumed"] == 0
    second = await pool.claim("decode", "w")
    assert second is not None
    assert second.id == later
    await pool.age(delivery, "~")  # it waits as long as it takes
    assert (await pool.sweep())["parked"] == 0
    await pool.make_due(delivery.id)
    newest = await pool.admit("decode")
    assert (await pool.sweep())["resumed"] == 1
    claimed = [await pool.claim("decode", "w") for _ in range(2)]
    assert [one.id for one in claimed if one] == [delivery.id, newest]


async def test_a_delayed_request_that_ends_leaves_nothing(pool: Pool) -> None:
    retried = await pool.claimed("decode")
    await pool.retry(retried, delay_s=60)
    for request_id in (retried.id, await pool.admit("decode", delay_s=60)):
        await pool.queue.cancel(request_id, "test")
    assert await pool.connection.command("ZCARD", pool.keys.delayed()) == 0
    assert await pool.connection.command("XLEN", pool.keys.lane("decode", "default")) == 0
    assert await pool.connection.command("HGET", pool.keys.counters(), "waiting:decode:default") == b"0"


async def test_what_is_admitted_for_later_is_claimed_then(pool: Pool) -> None:
    request_id = await pool.admit("decode", delay_s=60)
    await pool.sweep()
    assert await pool.claim("decode", "w") is None
    await pool.make_due(request_id)
    await pool.sweep()
    delivery = await pool.claim("decode", "w")
    assert delivery is not None
    assert delivery.id == request_id
    assert await pool.connection.command("HGET", pool.keys.counters(), "waiting:decode:default") == b"0"


async def test_a_suspect_is_given_to_an_idle_worker_only(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    assert not delivery.is_suspect
    await pool.retry(delivery, is_suspect=True)
    assert await pool.claim("decode", "w", held=1) is None
    again = await pool.claim("decode", "w", held=0)
    assert again is not None
    assert again.is_suspect


async def test_who_died_with_its_worker_is_suspect_unless_it_had_got_on(pool: Pool) -> None:
    stuck, moving = await pool.claimed("decode"), await pool.claimed("decode")
    await pool.queue.step("w", [StepItem(moving.id, API, moving.epoch, LLMEngineOutput(moving.id, 0, 0, [7]))])
    assert await pool.queue.evict("decode", "w", max_attempts=3) == 2
    again = {one.id: one.is_suspect for _ in range(2) if (one := await pool.claim("decode", "w2"))}
    assert again == {stuck.id: True, moving.id: False}


async def test_what_has_aged_on_a_lower_lane_goes_first_in_a_guarding_claim(pool: Pool) -> None:
    low, high = await pool.admit("decode", lane="low"), await pool.admit("decode", lane="high")
    looks = [LaneLook("low", 9, "aged"), LaneLook("high", 9), LaneLook("low", 9)]
    first = await pool.claim("decode", "w", *looks, guard_ms=60_000)
    assert first is not None
    assert first.id == high
    await pool.admit("decode", lane="high")
    second = await pool.claim("decode", "w", *looks, guard_ms=0)
    assert second is not None
    assert second.id == low


async def test_a_spare_look_takes_only_what_nobody_has_started(pool: Pool) -> None:
    waiting = await pool.admit("prefill")
    look = LaneLook("default", 9, "spare")
    assert await pool.claim("prefill", "busy", look) is None
    await asyncio.sleep(0.03)
    taken = await pool.claim("prefill", "busy", look)
    assert taken is not None
    assert taken.id == waiting


async def test_requests_of_an_api_that_is_gone_go_on_as_long_as_they_say(pool: Pool) -> None:
    ended, lingering, resumable = [await pool.admit("decode", linger_s=linger_s) for linger_s in (0.0, 3600.0, None)]
    await pool.api_is(API, 2**53)
    await pool.sweep()
    assert [await pool.state(one) for one in (ended, lingering, resumable)] == ["queued"] * 3
    await pool.api_is(API, 1)
    await pool.sweep()
    await pool.sweep()
    assert [await pool.state(one) for one in (ended, lingering, resumable)] == ["cancelled", "queued", "queued"]
    assert await pool.connection.command("ZCARD", pool.keys.alive("api")) == 0
    assert await pool.connection.command("EXISTS", pool.keys.served(API)) == 0


async def test_a_lease_that_ran_out_is_found_behind_many_parked_tasks(pool: Pool) -> None:
    for _ in range(600):
        parked = await pool.claimed("decode")
        await pool.queue.hand_back(parked, "w", counts=False, max_attempts=3, why="test", delay_s=3600)
    running = await pool.claimed("decode")
    await pool.connection.command("EVAL", PARK_ALL, 1, pool.keys.lane("decode", "default"))
    await pool.age(running, "w")
    assert (await pool.sweep())["parked"] == 1


async def test_a_step_of_another_worker_is_fenced_even_at_the_same_epoch(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    output = LLMEngineOutput(delivery.id, 0, 0, [7])
    assert await pool.queue.step("zombie", [StepItem(delivery.id, API, delivery.epoch, output)]) == [Verdict.FENCED]


async def test_a_request_that_redis_lost_is_brought_back_with_what_was_sent(pool: Pool) -> None:
    item = request(3)
    admission = Admission(item, "decode", "default", API, linger_s=0.0)
    await pool.queue.admit(admission, LIMITS)
    before = await pool.claim("decode", "w")
    assert before is not None
    await pool.connection.command("FLUSHALL")
    sent = Log(tokens=[[5, 6, 7]], finished=[None])
    for _ in range(2):
        assert await pool.queue.restore(admission, LIMITS, sent) == Restored("ok")
    after = await pool.claim("decode", "w")
    assert after is not None
    assert (after.log.tokens, after.epoch > before.epoch) == ([[5, 6, 7]], True)
    output = LLMEngineOutput(item.id, 0, 3, [8])
    assert await pool.queue.step("w", [StepItem(item.id, API, before.epoch, output)]) == [Verdict.FENCED]
    assert await pool.queue.step("w", [StepItem(item.id, API, after.epoch, output)]) == [Verdict.ACCEPTED]


async def test_the_lost_end_of_a_log_is_put_back_and_its_worker_fenced(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.queue.step("w", [StepItem(delivery.id, API, delivery.epoch, LLMEngineOutput(delivery.id, 0, 0, [5]))])
    admission = Admission(request_named(delivery.id), "decode", "default", API)
    assert await pool.queue.restore(admission, LIMITS, Log(tokens=[[9, 6]], finished=[None])) == Restored("diverged", 0)
    assert await pool.queue.restore(admission, LIMITS, Log(tokens=[[5, 6]], finished=[None])) == Restored("ok")
    assert await pool.queue.renew("decode", "w", b"", 30, [(delivery.id, delivery.epoch)]) == [False]
    again = await pool.claim("decode", "w")
    assert again is not None
    assert again.log.tokens == [[5, 6]]


async def test_a_whole_answer_that_redis_lost_ends_as_done(pool: Pool) -> None:
    item = request(3)
    sent = Log(tokens=[[5, 6]], finished=[FinishReason.LENGTH])
    await pool.queue.restore(Admission(item, "decode", "default", API), LIMITS, sent)
    assert await pool.state(item.id) == "done"


async def test_a_cancelled_task_that_had_been_parked_leaves_its_lane_at_once(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.retry(delivery)
    await pool.queue.cancel(delivery.id, "test")
    assert await pool.connection.command("XLEN", pool.keys.lane("decode", "default")) == 0


async def test_more_parked_tasks_than_one_claim_looks_at_hold_nobody_up(pool: Pool) -> None:
    for _ in range(300):
        await pool.admit("decode", blocks=100)  # never on a worker of 99 blocks
    assert await pool.claim("decode", "w") is None
    small = await pool.admit("decode")
    for _ in range(3):
        if (found := await pool.claim("decode", "w")) is not None:
            break
    assert found is not None
    assert found.id == small


def request_named(request_id: str) -> Request:
    return msgspec.structs.replace(request(3), id=request_id)


async def test_ten_thousand_tasks_wait_behind_one_that_runs_for_an_hour(pool: Pool) -> None:
    pinned = await pool.claimed("decode")
    many = Limits(max_waiting_tasks=20_000, max_waiting_tokens=10**9, deadline_s=7200, result_ttl_s=60)
    waiting = [Admission(request(3), "decode", "default", API) for _ in range(10_000)]
    for start in range(0, len(waiting), 500):
        await asyncio.gather(*(pool.queue.admit(one, many) for one in waiting[start : start + 500]))
    for _ in range(3):
        await pool.age(pinned, "w")
        await pool.queue.renew("decode", "w", b"", 30, [(pinned.id, pinned.epoch)])
        assert not any((await pool.sweep()).values())
        first = await pool.claim("decode", "other")
        assert first is not None
        assert first.id != pinned.id
    await pool.age(pinned, "w")
    assert (await pool.sweep())["parked"] == 1
    again = await pool.claim("decode", "other")
    assert again is not None
    assert again.id == pinned.id  # ahead of all that came later


async def test_who_is_notified_hears_the_end_and_no_tokens(pool: Pool) -> None:
    item = request(3)
    admission = Admission(item, "decode", "default", "", notify="client-1")
    await pool.queue.admit(admission, LIMITS)
    delivery = await pool.claim("decode", "w")
    assert delivery is not None
    assert delivery.api == ""
    subscription = await pool.connection.subscribe(pool.keys.bus("client-1"))
    await pool.queue.step(
        "w",
        [StepItem(item.id, delivery.api, delivery.epoch, LLMEngineOutput(delivery.key, 0, 0, [7], FinishReason.EOS))],
    )
    await pool.queue.end(item.id, "done", worker="w", epoch=delivery.epoch, result=b"kept")
    async with asyncio.timeout(10):
        async for _, data in subscription.messages():
            if data is not None:
                break
    (first,) = msgspec.msgpack.decode(data, type=Frame)
    assert (type(first), first.id, first.state) == (EndItem, item.id, "done")
    (brief,) = await pool.queue.standing([item.id], with_results=True)
    assert brief is not None
    assert (brief.state, brief.result) == ("done", b"kept")


async def test_a_request_without_tokens_is_counted_in_and_out(pool: Pool) -> None:
    """Its change of the counter must not be -0, which Redis does not take for a number."""
    item = Request(id="p-1", kind="task", created_s=0, input=no_input("p-1", POOL), task=TaskCall(name="t"))
    await pool.queue.admit(Admission(item, "words", "default", ""), LIMITS)
    assert await pool.claim("words", "w") is not None
    assert await pool.connection.command("HGET", pool.keys.counters(), "tokens:words:default") == b"0"


async def test_a_request_whose_last_tokens_redis_lost_is_not_done(pool: Pool) -> None:
    """Its worker logged them, but they went with a power cut before it could say the end."""
    delivery = await pool.claimed("decode")
    await pool.queue.step("w", [StepItem(delivery.id, API, delivery.epoch, LLMEngineOutput(delivery.id, 0, 0, [7]))])
    for _ in range(2):
        assert await pool.queue.end(delivery.id, "done", worker="w", epoch=delivery.epoch) == ("incomplete", "")
    assert await pool.state(delivery.id) == "running"
    last = LLMEngineOutput(delivery.id, 0, 1, [8], FinishReason.EOS)
    await pool.queue.step("w", [StepItem(delivery.id, API, delivery.epoch, last)])
    assert await pool.queue.end(delivery.id, "done", worker="w", epoch=delivery.epoch) == ("done", "")


async def test_a_suspect_that_is_handed_back_unproven_stays_one(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.retry(delivery, is_suspect=True)
    again = await pool.claim("decode", "w")
    assert again is not None
    await pool.queue.hand_back(again, "w", counts=False, max_attempts=3, why="drained")
    third = await pool.claim("decode", "w")
    assert third is not None
    assert third.is_suspect


async def test_many_suspects_keep_no_busy_worker_from_others(pool: Pool) -> None:
    suspects = [await pool.claimed("decode") for _ in range(20)]
    for suspect in suspects:
        await pool.retry(suspect, is_suspect=True)
    other = await pool.admit("decode")
    delivery = await pool.claim("decode", "w", held=1, overtake_ms=0, guard_ms=60_000)
    assert delivery is not None
    assert delivery.id == other
    assert await pool.claim("decode", "w", held=1, overtake_ms=-1, guard_ms=0) is None  # and one day it waits for them


async def test_a_lease_is_as_long_as_its_worker_says(pool: Pool) -> None:
    """Whoever sweeps may have other settings."""
    delivery = await pool.claimed("decode")
    await pool.queue.renew("decode", "w", b"", 3600, [(delivery.id, delivery.epoch)])
    await pool.age(delivery, "w")
    assert (await pool.sweep(lease_s=1))["parked"] == 0
