"""Redis comes back without what it had taken: the API that serves a request brings it back, and no stream is ever spliced."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.protocol import Request
from pipeline.stream import Ended
from tests.proxy import RedisProxy, Trap
from tests.system import System, collect, request, take

pytestmark = pytest.mark.faults

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


@pytest.mark.parametrize("seed", [7, None], ids=["seeded", "unseeded"])
async def test_the_end_of_a_log_is_lost(default_redis_url: str, tmp_path: Path, seed: int | None) -> None:
    """As after a fail-over to a replica that had not heard the last writes. How an unseeded answer went on is told by nothing but what was
    sent, so it goes on only if that is put back."""
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")
        fields = {"max_tokens": 60, "temperature": 1.0, "seed": seed}
        expected, _ = await read(client, request(100, **fields))
        item = request(100, **fields)
        tokens: list[list[int]] = [[]]
        losses = [(20, 1), (30, 7)]  # at so many tokens so many are lost
        async with await client.submit(item) as stream:
            async for chunks in stream:
                for chunk in chunks:
                    take(tokens, chunk)
                if losses and len(tokens[0]) >= losses[0][0]:
                    await lose_end_of_log(system, item, len(tokens[0]) - losses.pop(0)[1])
        assert stream.ended is not None
        assert (stream.ended.state, len(tokens[0])) == ("done", 60)
        assert seed is None or tokens == expected
        standing = await client.queue.attach(item.id, watch=False)
        assert standing is not None
        assert standing.log.tokens == tokens
        assert await system.counter("restored") >= 1
        await system.until(system.rests, 10)


async def lose_end_of_log(system: System, item: Request, kept: int) -> None:
    """Redis holds no more than this of it, and its worker is gone with what it knew."""
    command, keys = system.connection.command, system.keys
    await command("SET", keys.log(item.id, 0), await command("GETRANGE", keys.log(item.id, 0), 0, 4 * kept - 1))
    await command("HSET", keys.request(item.id), "owner", "nobody")


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


async def test_the_last_tokens_are_lost_before_the_end_is_said(
    default_redis_url: str, short_dir: Path, tmp_path: Path
) -> None:
    """All was computed and logged; a power cut takes the last tokens, and only then the worker says that it is done."""
    async with (
        RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy,
        System(default_redis_url, *SETTINGS, "api.silence_s=600", log_dir=tmp_path) as system,
        system.client() as client,
    ):
        await system.worker("prefill")
        system.overrides.append(f"redis.url={proxy.url}")
        await system.worker("decode")
        expected, _ = await read(client, request(100, max_tokens=30))
        trap = proxy.arm(Trap("end", "before", holds=True))
        item = request(100, max_tokens=30)
        reading = asyncio.create_task(read(client, item))
        await trap.hit.wait()
        command, keys = system.connection.command, system.keys
        await command("SET", keys.log(item.id, 0), await command("GETRANGE", keys.log(item.id, 0), 0, 4 * 20 - 1))
        await command("HDEL", keys.request(item.id), "fin:0")
        trap.release()
        tokens, ended = await reading
        assert (ended.state, tokens) == ("done", expected)
        standing = await client.queue.attach(item.id, watch=False)
        assert standing is not None
        assert standing.log.tokens == expected
        await system.until(system.rests, 10)
