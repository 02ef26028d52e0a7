"""Batches as OpenAI's client knows them, over real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pipeline.redis_server import RedisServer
from tests.batches.running import CHATS, batching, chat_line, text_line


async def test_a_batch_is_made_runs_and_gives_each_line_one_answer(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path) as it:
        lines = [chat_line(f"line {number}") for number in range(60)]
        made = await it.batch(lines, CHATS, metadata={"of": "tests"})
        assert (made.status, made.object, made.metadata) == ("validating", "batch", {"of": "tests"})
        batch = await it.ended(made.id)
        assert batch.status == "completed", batch
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (60, 60, 0)
        assert batch.error_file_id is None
        results = await it.lines(batch.output_file_id)
        assert sorted(line["custom_id"] for line in results) == sorted(line["custom_id"] for line in lines)
        assert all(line["response"]["body"]["object"] == "chat.completion" for line in results)
        assert batch.usage.output_tokens == 180
        await it.served.system.until(it.served.rests, 10)


async def test_a_cancelled_batch_keeps_what_was_answered(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with batching(
        default_redis_server, tmp_path, "engine.mock.decode_base_ms=20", "batches.max_in_flight=4"
    ) as it:
        made = await it.batch([text_line(str(number), max_tokens=10) for number in range(200)])

        async def some_are_done() -> bool:
            return (await it.client.batches.retrieve(made.id)).request_counts.completed > 0

        await it.served.system.until(some_are_done, 60)
        assert (await it.client.batches.cancel(made.id)).status in ("cancelling", "cancelled")
        batch = await it.ended(made.id)
        assert batch.status == "cancelled"
        done, missing = await it.lines(batch.output_file_id), await it.lines(batch.error_file_id)
        assert len(done) == batch.request_counts.completed
        assert {line["error"]["code"] for line in missing} == {"batch_cancelled"}
        assert sorted(int(line["custom_id"]) for line in [*done, *missing]) == list(range(200))
        await it.served.system.until(it.served.rests, 10)
        await asyncio.sleep(0)
