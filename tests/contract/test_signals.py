"""One reading of a pool: what waits and since when, what comes, runs and works."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.protocol import FinishReason, LLMEngineOutput
from pipeline.queue import LaneLook
from pipeline.said import WorkerSaid
from pipeline.scaling.reading import Reading, read
from tests.contract.test_guards import Pool


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    connection = Connection(RedisSettings(url=redis_url))
    yield Pool(connection)
    await connection.close()


async def reading(pool: Pool) -> Reading:
    """Twice, for the second call must find what the first one did."""
    first, second = [await read(pool.connection, pool.keys) for _ in range(2)]
    assert first.counters == second.counters
    assert first.stages == second.stages
    return second


async def test_a_pool_that_was_never_used_is_read(pool: Pool) -> None:
    said = await reading(pool)
    assert said.time_ms > 0
    assert said.stages["prefill"].workers == {}
    assert set(said.stages["decode"].oldest_ms.values()) == {0}
    assert said.count("waiting", "prefill", "default") == 0


async def test_what_waits_is_counted_with_its_tokens_and_the_age_of_the_oldest(pool: Pool) -> None:
    for lane in ("default", "default", "low"):
        await pool.admit("prefill", blocks=3, lane=lane)
        await asyncio.sleep(0.05)
    said = await reading(pool)
    assert [said.count("waiting", "prefill", lane) for lane in ("high", "default", "low")] == [0, 2, 1]
    assert said.count("tokens", "prefill", "default") == 2 * 19
    assert said.count("arrived", "prefill", "default") == 2
    assert said.count("arrived_tokens", "prefill", "low") == 19
    oldest = said.stages["prefill"].oldest_ms
    assert oldest["high"] == 0 < oldest["default"] < oldest["low"] <= said.time_ms
    assert said.time_ms - oldest["default"] >= 100


async def test_the_oldest_is_never_one_that_runs(pool: Pool) -> None:
    for _ in range(3):
        await pool.admit("decode")
        await asyncio.sleep(0.02)
    before = (await reading(pool)).stages["decode"].oldest_ms["default"]
    delivery = await pool.claim("decode", "w")
    assert delivery is not None
    after = await reading(pool)
    assert after.stages["decode"].oldest_ms["default"] > before
    assert after.count("running", "decode", "default") == 1
    await pool.queue.hand_back(delivery, "w", counts=False, max_attempts=3, why="test")
    assert (await reading(pool)).stages["decode"].oldest_ms["default"] == before  # parked: it waits as long as it did


async def test_what_waits_for_its_next_try_is_of_no_age(pool: Pool) -> None:
    await pool.retry(await pool.claimed("decode"), delay_s=60)
    said = await reading(pool)
    assert said.count("waiting", "decode", "default") == 1
    assert said.stages["decode"].oldest_ms["default"] == 0


async def test_what_was_admitted_for_later_waits_apart_and_arrives_when_its_time_comes(pool: Pool) -> None:
    soon = await pool.admit("prefill", blocks=3, delay_s=0.05)
    await pool.admit("prefill", blocks=3, delay_s=60)
    gone = await pool.admit("prefill", blocks=3, lane="high", delay_s=60)
    said = await reading(pool)
    assert [said.count(name, "prefill", "default") for name in ("waiting", "later", "later_tokens", "arrived")] == [
        2,
        2,
        38,
        0,
    ]
    await pool.queue.cancel(gone, "test")
    await asyncio.sleep(0.06)
    assert (await pool.sweep())["resumed"] == 1
    said = await reading(pool)
    assert [said.count(name, "prefill", "default") for name in ("waiting", "later", "later_tokens", "arrived")] == [
        2,
        1,
        19,
        1,
    ]
    assert said.count("arrived_tokens", "prefill", "default") == 19
    assert (said.count("later", "prefill", "high"), said.count("waiting", "prefill", "high")) == (0, 0)
    delivery = await pool.claim("prefill", "w", LaneLook("default", 9))
    assert delivery is not None and delivery.id == soon


@pytest.mark.parametrize("wrong", [-1, 7])
async def test_what_a_version_before_did_not_count_of_later_requests_is_counted_by_the_next_sweep(
    pool: Pool, wrong: int
) -> None:
    await pool.admit("prefill", blocks=3, delay_s=60)
    await pool.retry(await pool.claimed("decode"), delay_s=60)
    for name in ("later:prefill:default", "later_tokens:prefill:default", "later:decode:high"):
        await pool.connection.command("HSET", pool.keys.counters(), name, wrong)
    await pool.sweep()
    said = await reading(pool)
    assert (said.count("later", "prefill", "default"), said.count("later_tokens", "prefill", "default")) == (1, 19)
    assert (said.count("later", "decode", "high"), said.count("later", "decode", "default")) == (0, 0)


async def test_arrivals_are_no_retries_and_no_handovers(pool: Pool) -> None:
    delivery = await pool.claimed("prefill")
    await pool.retry(delivery)
    again = await pool.claim("prefill", "w")
    assert again is not None
    await pool.queue.handover(again, "w", [LLMEngineOutput(again.id, 0, 0, [7])], None, cached_tokens=0)
    said = await reading(pool)
    assert said.count("arrived", "prefill", "default") == 1
    assert said.count("arrived", "decode", "default") == 0
    assert said.count("waiting", "decode", "default") == 1


async def test_prompts_that_decode_computes_for_want_of_a_prefill_worker_are_told(pool: Pool) -> None:
    await pool.admit("decode", blocks=3)
    assert (await reading(pool)).count("local", "default") == 19
    await pool.queue.renew("prefill", "p", b"", 30)
    await pool.admit("decode", blocks=3)
    assert (await reading(pool)).count("local", "default") == 19  # one was there: it was the router's will
    await pool.queue.leave("prefill", "p")
    await pool.admit("prefill", blocks=3)
    await pool.queue.renew("decode", "d", b"", 30)
    assert (await pool.sweep())["moved"] == 1
    assert (await reading(pool)).count("local", "default") == 19  # and this one came to prefill, and was counted there


async def test_workers_are_those_that_live_and_what_they_say(pool: Pool) -> None:
    info = {
        "engine": {"num_blocks": 9, "max_num_seqs": 4},
        "stats": {"running": 2, "steps": 7, "step_ms": 1.5},
        "more": 1,
    }
    await pool.queue.renew("decode", "a", json.dumps(info).encode(), 30)
    await pool.queue.renew("decode", "b", b"\xff", 30)
    await pool.queue.renew("decode", "c", b"", 30)
    await pool.connection.command("ZADD", pool.keys.alive("decode"), 1, "c")  # it was not heard of for long
    workers = (await reading(pool)).stages["decode"].workers
    assert set(workers) == {"a", "b"}
    assert workers["b"] == WorkerSaid()
    assert (workers["a"].engine.max_num_seqs, workers["a"].stats.running, workers["a"].stats.step_ms) == (4, 2, 1.5)


async def test_answers_are_counted_with_their_tokens(pool: Pool) -> None:
    delivery = await pool.claimed("prefill")
    outputs = [LLMEngineOutput(delivery.id, 0, 0, [7], finish_reason=FinishReason.STOP)]
    await pool.queue.handover(delivery, "w", outputs, None, cached_tokens=0)
    said = await reading(pool)
    assert (said.count("answers"), said.count("answer_tokens")) == (1, 1)


async def test_counters_of_a_version_before_are_never_less_than_nothing(pool: Pool) -> None:
    delivery = await pool.claimed("decode")
    await pool.connection.command("HSET", pool.keys.counters(), "running:decode:default", 0)  # it was not counted
    await pool.queue.cancel(delivery.id, "test")
    assert (await reading(pool)).count("running", "decode", "default") == 0
    assert await pool.connection.command("HGET", pool.keys.counters(), "running:decode:default") == b"-1"
    await pool.sweep()  # where nothing runs, nothing is counted
    assert await pool.connection.command("HGET", pool.keys.counters(), "running:decode:default") == b"0"
    await pool.claimed("decode")
    await pool.sweep()
    assert (await reading(pool)).count("running", "decode", "default") == 1
