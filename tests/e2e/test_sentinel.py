"""Redis fails over to a replica through Sentinel: nothing that was promised is lost, and no stream is spliced."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from tests.sentinel import Guarded, guarded
from tests.system import System, collect, request

pytestmark = pytest.mark.faults

SETTINGS = ("worker.lease_s=5", "engine.mock.decode_base_ms=20", "api.silence_s=0.5", "redis.timeout_s=1")


@contextlib.asynccontextmanager
async def system_of(group: Guarded, log_dir: Path) -> AsyncIterator[System]:
    async with System(group.url, *SETTINGS, log_dir=log_dir) as system:
        await system.until(group.ready, 60)
        await system.worker("prefill")
        await system.worker("decode")
        yield system


async def test_streams_go_on_over_a_failover_that_loses_the_last_writes(tmp_path: Path) -> None:
    """Greedy and seeded requests get the tokens that they would have had; one without a seed does, too, or ends as diverged."""
    kinds = ({"n": 2}, {"temperature": 1.0, "seed": 7}, {"n": 3, "temperature": 1.0, "seed": 8})
    with guarded() as group:
        async with system_of(group, tmp_path) as system, system.client() as client:
            expected = [
                (await collect(await client.submit(request(100, max_tokens=150, **kind)), kind.get("n", 1)))[0]
                for kind in kinds
            ]
            items = [request(100, max_tokens=150, **kind) for kind in kinds]
            unseeded = request(100, max_tokens=150, temperature=1.0)
            pauses: list[float] = []
            everyone = [*items, unseeded]
            streams = [(await client.submit(item), item.input.sampling_options.n) for item in everyone]
            reading = [asyncio.create_task(collect(stream, n, pauses)) for stream, n in streams]
            for item in everyone:
                await system.until(lambda item=item: system.logged(item.id, 10), 20)
            group.cut_replication()
            logged = {item.id: await system.connection.command("STRLEN", system.keys.log(item.id, 0)) for item in items}
            late = request(100, max_tokens=150)  # admitted where nobody will find it
            reading.append(asyncio.create_task(collect(await client.submit(late), 1, pauses)))
            for item in items:
                await system.until(lambda item=item: system.logged(item.id, logged[item.id] // 4 + 10), 20)
            await system.until(lambda: system.logged(late.id, 5), 20)
            group.kill_master()
            async with asyncio.timeout(60):
                *answers, free, brought_back = await asyncio.gather(*reading)
            assert [(ended.state, tokens) for tokens, ended in answers] == [("done", tokens) for tokens in expected]
            assert (brought_back[1].state, brought_back[0][0]) == ("done", expected[0][0])
            assert free[1].state == "done" or free[1].reason.startswith("stream_diverged")
            assert await system.counter("restored") >= 1  # `late` at least, which the new master had not heard of
            _, ended = await collect(await client.submit(request(100)))
            assert ended.state == "done"
            await system.until(system.rests, 20)
            print(f"\npause of streams over a failover through Sentinel: {max(pauses):.1f} s")


async def test_a_master_that_hangs_is_left_for_the_new_one(tmp_path: Path) -> None:
    """Its connections stay open and say nothing, subscriptions included; later it comes back as a replica."""
    with guarded(sentinels=3) as group:
        async with system_of(group, tmp_path) as system, system.client() as client:
            expected, _ = await collect(await client.submit(request(100, max_tokens=150)))
            item = request(100, max_tokens=150)
            pauses: list[float] = []
            reading = asyncio.create_task(collect(await client.submit(item), item.input.sampling_options.n, pauses))
            await system.until(lambda: system.logged(item.id, 10), 20)
            group.servers[0].process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(60):
                tokens, ended = await reading
            assert (ended.state, tokens) == ("done", expected)
            group.servers[0].process.send_signal(signal.SIGCONT)
            await system.until(lambda: group.servers[0].command("SET", "a", "1").startswith(b"-READONLY"), 30)
            _, ended = await collect(await client.submit(request(100)))
            assert ended.state == "done"
            await system.until(system.rests, 20)
            print(f"\npause of a stream whose master hung: {max(pauses):.1f} s")


async def test_an_orderly_failover(tmp_path: Path) -> None:
    with guarded() as group:
        async with system_of(group, tmp_path) as system, system.client() as client:
            expected, _ = await collect(await client.submit(request(100, max_tokens=150)))
            item = request(100, max_tokens=150)
            pauses: list[float] = []
            reading = asyncio.create_task(collect(await client.submit(item), item.input.sampling_options.n, pauses))
            await system.until(lambda: system.logged(item.id, 10), 20)
            sentinel = Connection(RedisSettings(url=f"redis://127.0.0.1:{group.sentinel_ports[0]}"))
            await sentinel.command("SENTINEL", "FAILOVER", "mymaster")
            await sentinel.close()
            async with asyncio.timeout(60):
                tokens, ended = await reading
            assert (ended.state, tokens) == ("done", expected)
            await system.until(lambda: group.servers[0].command("SET", "a", "1").startswith(b"-READONLY"), 30)
            await system.until(system.rests, 20)
            print(f"\npause of a stream over an orderly failover: {max(pauses):.1f} s")


async def test_a_subscription_moves_to_the_new_master(tmp_path: Path) -> None:
    """Also when the old one hangs and keeps the line open."""
    with guarded() as group:
        connection = Connection(RedisSettings(url=group.url, timeout_s=1))
        async with System(group.url) as system:
            await system.until(group.ready, 60)
        subscription = await connection.subscribe("news")
        messages = subscription.messages()
        reading = asyncio.ensure_future(anext(messages))
        group.servers[0].process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(60):
            assert await reading == ("news", None)
            group.servers[1].command("PUBLISH", "news", "hello")
            assert await anext(messages) == ("news", b"hello")
        await messages.aclose()
        await connection.close()
