"""The token bus over real Redis: several readers, lost subscriptions, lost frames, a silent bus."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pipeline.stream import RequestStream
from tests.system import System, collect, request, take

SLOW = "engine.mock.decode_base_ms=15"


async def test_readers_attach_on_other_replicas_and_read_from_the_first_token(redis_url: str, tmp_path: Path) -> None:
    async with System(redis_url, SLOW, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client("api-a") as serving, system.client("api-b") as other:
            item = request(40, n=2, max_tokens=60)
            stream = await serving.submit(item)
            first = asyncio.create_task(collect(stream, 2))
            await system.until(lambda: begun(stream), 20)
            readers = [asyncio.create_task(collect(await other.attach(item.id, 2), 2)) for _ in range(2)]
            answers = await asyncio.gather(first, *readers)
            assert {str(tokens) for tokens, _ in answers} == {str(answers[0][0])}
            assert {ended.state for _, ended in answers} == {"done"}
            late, ended = await collect(await other.attach(item.id, 2), 2)  # after the end: from the log alone
            assert (late, ended.usage) == (answers[0][0], answers[0][1].usage)


async def begun(stream: RequestStream) -> bool:
    return sum(stream._next) > 4


async def test_a_dropped_subscription_costs_no_token(redis_url: str, tmp_path: Path) -> None:
    """What was missed is read at once: no silence has to tell."""
    async with System(redis_url, SLOW, "api.silence_s=600", log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            streams = [await client.submit(request(20, max_tokens=80)) for _ in range(3)]
            reading = [asyncio.create_task(collect(stream)) for stream in streams]
            for _ in range(4):
                await asyncio.sleep(0.2)
                await system.connection.command("CLIENT", "KILL", "TYPE", "pubsub")  # the workers', too
            answers = await asyncio.gather(*reading)
            assert [len(tokens[0]) for tokens, _ in answers] == [80] * 3


async def test_frames_that_never_came_are_read_from_the_log(default_redis_url: str, tmp_path: Path) -> None:
    """The request names another process, so that nothing comes live; the silence check finds log and end."""
    async with System(default_redis_url, "api.silence_s=0.3", log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client("deaf") as client:
            item = request(20, max_tokens=30)
            stream = await client.submit(item)
            await system.connection.command("HSET", system.keys.request(item.id), "api", "nobody")
            tokens: list[list[int]] = [[]]
            async with stream, asyncio.timeout(20):
                async for chunks in stream:
                    for chunk in chunks:
                        take(tokens, chunk)
            assert len(tokens[0]) == 30
            assert stream.ended is not None
            assert stream.ended.state == "done"
