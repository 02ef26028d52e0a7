"""Redis comes back without what it had taken: the API that serves a request brings it back, and no stream is ever spliced."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.protocol import Request
from pipeline.stream import Ended
from tests.system import System, collect, request, take

SETTINGS = ("worker.lease_s=2", "engine.mock.decode_base_ms=20", "api.silence_s=0.5")


async def read(client: PoolClient, item: Request) -> tuple[list[list[int]], Ended]:
    return await collect(await client.submit(item), item.input.sampling_options.n)


async def test_everything_is_lost_in_the_middle_of_streams(redis_url: str, tmp_path: Path) -> None:
    """Greedy and seeded requests go on with the tokens that they would have had."""
    async with System(redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")
        kinds = ({"n": 2}, {"temperature": 1.0, "seed": 7}, {"n": 3, "temperature": 1.0, "seed": 8})
        expected = [(await read(client, request(100, max_tokens=60, **kind)))[0] for kind in kinds]
        items = [request(100, max_tokens=60, **kind) for kind in kinds]
        reading = [asyncio.create_task(read(client, item)) for item in items]
        for item in items:
            await system.until(lambda item=item: system.logged(item.id, 10), 20)
        await system.connection.command("FLUSHALL")
        answers = await asyncio.gather(*reading)
        assert [(ended.state, tokens) for tokens, ended in answers] == [("done", tokens) for tokens in expected]
        assert await system.counter("restored") >= len(items)
        await system.until(system.rests, 10)


async def test_what_waits_is_brought_back_too(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        reading = asyncio.create_task(read(client, request(100)))
        await system.until(lambda: system.counter("admitted"), 10)
        await system.connection.command("FLUSHALL")
        await system.worker("prefill")
        await system.worker("decode")
        tokens, ended = await reading
        assert (ended.state, len(tokens[0])) == ("done", 16)


@pytest.mark.parametrize("cut", [1, 7])
async def test_the_end_of_a_log_is_lost(default_redis_url: str, tmp_path: Path, cut: int) -> None:
    """As after a fail-over to a replica that had not heard the last writes."""
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")
        expected, _ = await read(client, request(100, max_tokens=60))
        item = request(100, max_tokens=60)
        tokens: list[list[int]] = [[]]
        stream = await client.submit(item)
        async with stream:
            async for chunks in stream:
                for chunk in chunks:
                    take(tokens, chunk)
                if 20 <= len(tokens[0]) < 20 + 10:
                    log = system.keys.log(item.id, 0)
                    kept = await system.connection.command("GETRANGE", log, 0, 4 * (len(tokens[0]) - cut) - 1)
                    await system.connection.command("SET", log, kept)
        assert stream.ended is not None
        assert (stream.ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)


async def test_other_tokens_in_the_log_end_the_stream_instead_of_splicing_it(
    default_redis_url: str, tmp_path: Path
) -> None:
    """An unseeded request that another worker went on with, from a log that Redis had lost the end of."""
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")
        item = request(100, max_tokens=200, temperature=1.0)
        reading = asyncio.create_task(read(client, item))
        await system.until(lambda: system.logged(item.id, 10), 20)
        await system.connection.command("SETRANGE", system.keys.log(item.id, 0), 8, b"\x01\x02\x00\x00" * 4)
        for stream in client._streams[item.id]:
            stream.fall_behind()
        tokens, ended = await reading
        assert (ended.state, ended.reason.partition(":")[0]) == ("failed", "stream_diverged")
        assert len(tokens[0]) >= 10
