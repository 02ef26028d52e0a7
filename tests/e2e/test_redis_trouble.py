"""What Redis may do in the middle of streams, one test a row of the table in pipeline/README.md."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.protocol import Request
from pipeline.redis_server import RedisServer
from pipeline.stream import Ended
from tests.proxy import RedisProxy, Trap
from tests.serving import STREAM, events_of, serving
from tests.system import System, collect, request

pytestmark = pytest.mark.faults

SETTINGS = ("worker.lease_s=2", "engine.mock.decode_base_ms=20", "api.silence_s=0.5", "redis.timeout_s=1")
KINDS: tuple[dict[str, float], ...] = ({"n": 2}, {"temperature": 1.0, "seed": 7})
NO_PERSISTENCE = ["--appendonly", "no"]


@contextlib.asynccontextmanager
async def running(url: str, log_dir: Path, *overrides: str) -> AsyncIterator[tuple[System, PoolClient]]:
    async with System(url, *SETTINGS, *overrides, log_dir=log_dir) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")
        yield system, client


async def read(client: PoolClient, item: Request, pauses: list[float] | None = None) -> tuple[list[list[int]], Ended]:
    return await collect(await client.submit(item), item.input.sampling_options.n, pauses)


def some(max_tokens: int = 100) -> list[Request]:
    return [request(100, max_tokens=max_tokens, **kind) for kind in KINDS]  # type: ignore[arg-type]


async def undisturbed(client: PoolClient, max_tokens: int = 100) -> list[list[list[int]]]:
    return [(await read(client, item))[0] for item in some(max_tokens)]


async def begin(
    system: System, client: PoolClient, items: list[Request], pauses: list[float] | None = None
) -> list[asyncio.Task[tuple[list[list[int]], Ended]]]:
    """Read all of them; returns when each has ten tokens."""
    reading = [asyncio.create_task(read(client, item, pauses)) for item in items]
    for item in items:
        await system.until(lambda item=item: system.logged(item.id, 10), 20)
    return reading


async def check(
    system: System, client: PoolClient, reading: list[asyncio.Task[tuple[list[list[int]], Ended]]],
    expected: list[list[list[int]]],
) -> None:  # fmt: skip
    """All end with the tokens that they would have had, new ones work, and nothing is left."""
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*reading)
    assert [(ended.state, tokens) for tokens, ended in answers] == [("done", tokens) for tokens in expected]
    async with asyncio.timeout(30):
        assert (await read(client, request(100)))[1].state == "done"
    await system.until(system.rests, 20)


async def epochs(system: System, items: list[Request]) -> list[bytes]:
    return [await system.connection.command("HGET", system.keys.request(item.id), "epoch") for item in items]


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("persistence", ["everysec", "always", "none"])
async def test_a_restart(short_dir: Path, tmp_path: Path, persistence: str, how: str) -> None:
    """Whatever Redis kept, the streams go on: with no persistence the API that serves them brings them back."""
    options = NO_PERSISTENCE if persistence == "none" else []
    fsync = "everysec" if persistence == "none" else persistence
    server = RedisServer.start(short_dir, appendfsync=fsync, options=options)
    server.wait_ready()
    try:
        async with running(server.url, tmp_path) as (system, client):
            expected = await undisturbed(client)
            pauses: list[float] = []
            reading = await begin(system, client, some(), pauses)
            down_s = time.monotonic()
            if how == "killed":
                server.process.kill()
            server.stop()
            server = RedisServer.start(short_dir, appendfsync=fsync, options=options)
            server.wait_ready()
            up_s = time.monotonic()
            await check(system, client, reading, expected)
            print(f"\n{how}, {persistence}: away for {up_s - down_s:.2f} s, pause of streams {max(pauses):.2f} s")
            if persistence == "always":
                assert await system.counter("restored") == 0
            if persistence == "none":
                assert await system.counter("restored") >= len(KINDS)
    finally:
        server.stop()


async def test_a_pause_longer_than_a_lease(redis_url: str, tmp_path: Path) -> None:
    """Nobody could renew, so nobody loses a task: the deliveries of before go on."""
    async with running(redis_url, tmp_path) as (system, client):
        expected = await undisturbed(client, 200)
        items = some(200)
        reading = await begin(system, client, items)
        before = await epochs(system, items)
        await system.connection.command("CLIENT", "PAUSE", 4000, "ALL")
        await system.until(lambda: system.counter("lease_holds"), 30)
        await check(system, client, reading, expected)
        assert await epochs(system, items) == before


async def test_pubsub_connections_are_killed_again_and_again(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path) as (system, client):
        expected = await undisturbed(client, 150)
        reading = await begin(system, client, some(150))
        killed = 0
        while not all(task.done() for task in reading) and killed < 200:
            killed += await system.connection.command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.wait(reading, timeout=0.2)
        assert killed > 3
        await check(system, client, reading, expected)


async def test_replies_are_lost(default_redis_url: str, short_dir: Path, tmp_path: Path) -> None:
    """Claims, hand-overs, steps and ends are carried out and their answers never come: the scripts are repeated."""
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
            system.overrides.append(f"redis.url={proxy.url}")  # of the workers only
            await system.worker("prefill")
            await system.worker("decode")
            expected = await undisturbed(client)
            reading = [asyncio.create_task(read(client, item)) for item in some()]
            traps = [proxy.arm(Trap(None, "reply"))]
            while not all(task.done() for task in reading):
                if traps[-1].hit.is_set():
                    traps.append(proxy.arm(Trap(None, "reply")))
                await asyncio.wait(reading, timeout=0.1)
            assert len(traps) > 4
            await check(system, client, reading, expected)


async def test_scripts_are_flushed(redis_url: str, tmp_path: Path) -> None:
    async with running(redis_url, tmp_path) as (system, client):
        expected = await undisturbed(client)
        reading = await begin(system, client, some())
        while not all(task.done() for task in reading):
            await system.connection.command("SCRIPT", "FLUSH")
            await asyncio.wait(reading, timeout=0.05)
        await check(system, client, reading, expected)


async def test_memory_is_full_in_the_middle_of_a_stream(short_dir: Path, tmp_path: Path) -> None:
    """Running streams end as they would have; a new request is a 503 with Retry-After; afterwards all is as before."""
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        async with serving(server, tmp_path, *SETTINGS) as served, served.http() as http:
            body = STREAM | {"max_tokens": 100, "ignore_eos": True}
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                await served.system.until(lambda: served.running(1), 20)
                server.command("CONFIG", "SET", "maxmemory", "1mb")
                refused = await http.post("/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) > 0
                data = await events_of(response)
            assert data.endswith(b"data: [DONE]\n\n")
            assert b'"error"' not in data

            async def is_told() -> bool:
                health = (await http.get("/health")).json()
                return health["status"] == "degraded" and "redis memory" in str(health["pools"])

            await served.system.until(is_told, 30)
            server.command("CONFIG", "SET", "maxmemory", "0")
            assert (await http.post("/v1/chat/completions", json=STREAM)).status_code == 200
            await served.system.until(served.rests, 20)


async def test_a_password_changes_under_running_streams(short_dir: Path, tmp_path: Path) -> None:
    """They wait, what is wrong is said, and they go on when it is put right."""
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        async with running(server.url, tmp_path) as (system, client):
            expected = await undisturbed(client)
            reading = await begin(system, client, some())
            server.command("CONFIG", "SET", "requirepass", "secret")
            admin = Connection(RedisSettings(url=f"unix://:secret@{server.socket_path}"))
            await admin.command("CLIENT", "KILL", "SKIPME", "yes")

            def said() -> bool:
                return all(
                    "refuses the user or password" in path.read_text() for path in tmp_path.glob("workers-*.log")
                )

            await system.until(lambda: said() and "refuses" in (client.redis_error or ""), 30)
            assert [process.poll() for process in system.processes] == [None, None]
            await admin.command("CONFIG", "SET", "requirepass", "")
            await admin.close()
            await check(system, client, reading, expected)
