"""Connections to a Redis that goes away and comes back."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import uvloop

from pipeline.config import RedisSettings
from pipeline.connection import Connection, Subscription, _library_call
from pipeline.errors import RedisUnavailable
from pipeline.redis_server import RedisServer
from tests.proxy import RedisProxy
from tests.system import System

pytestmark = pytest.mark.faults


async def test_a_subscription_outlives_a_redis_that_was_away_for_several_attempts(short_dir: Path) -> None:
    # Given a subscription, and Redis killed
    server = RedisServer.start(short_dir)
    server.wait_ready()
    connection = Connection(RedisSettings(url=server.url))
    subscription = await connection.subscribe("news")
    messages = subscription.messages()
    reading = asyncio.ensure_future(anext(messages))
    server.process.kill()
    server.stop()

    # When it comes back after the first attempts to reconnect have failed
    attempts = 0
    while attempts < 3:
        await asyncio.wait([reading], timeout=0.1)
        assert not reading.done()
        attempts += 1
    server = RedisServer.start(short_dir)
    server.wait_ready()

    # Then the reader is told that the channel was subscribed anew, and gets messages again
    async with asyncio.timeout(30):
        assert await reading == ("news", None)
        server.command("PUBLISH", "news", "hello")
        assert await anext(messages) == ("news", b"hello")

    await messages.aclose()
    await connection.close()
    server.stop()


async def test_a_channel_that_is_added_while_redis_is_away_is_heard_when_it_is_back(short_dir: Path) -> None:
    server = RedisServer.start(short_dir)
    server.wait_ready()
    connection = Connection(RedisSettings(url=server.url))
    subscription = await connection.subscribe("news", "old")
    messages = subscription.messages()
    server.process.kill()
    server.stop()
    await subscription.add("more")
    await subscription.remove("old")

    server = RedisServer.start(short_dir)
    server.wait_ready()
    async with asyncio.timeout(30):
        assert {(await anext(messages))[0] for _ in range(2)} == {"news", "more"}
        server.command("PUBLISH", "more", "hello")
        assert await anext(messages) == ("more", b"hello")

    await messages.aclose()
    await connection.close()
    server.stop()


async def test_clients_that_come_and_go_together_always_leave(default_redis_url: str) -> None:
    """Each leaving client rings the other one in the moment in which that is cancelled, too."""
    async with System(default_redis_url) as system:
        for _ in range(30):
            async with asyncio.timeout(10), system.client("api-a"), system.client("api-b"):
                await asyncio.sleep(0.01)


async def test_more_calls_than_connections_wait_for_one_another(default_redis_url: str) -> None:
    connection = Connection(RedisSettings(url=default_redis_url))
    answers = await asyncio.gather(*(connection.command("INCR", "counted") for _ in range(400)))
    assert sorted(answers) == list(range(1, 401))
    await connection.close()


async def test_a_cancellation_that_meets_a_lost_connection_is_kept() -> None:
    """As `asyncio.wait_for` of Python 3.11 does it: the cancellation is swallowed, the call's own error is raised."""

    async def call() -> None:
        with _library_call():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise ConnectionError("lost in the same moment") from None

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_line_that_the_server_closes_is_a_lost_connection_whatever_the_loop_says(default_redis_url: str) -> None:
    """Workers and API run on uvloop, which raises a RuntimeError for a write that comes in that moment."""

    async def talk(connection: Connection) -> None:
        for _ in range(300):
            with contextlib.suppress(RedisUnavailable):
                await connection.command("PING")
                await connection.commands(("PING",), ("PING",))
            await asyncio.sleep(0.002)

    async def listen(subscription: Subscription) -> None:
        async for _ in subscription.messages():
            pass

    async def change(subscription: Subscription) -> None:
        while True:
            await subscription.add("more")
            await asyncio.sleep(0.002)

    async def close_lines(admin: Connection) -> None:
        while True:
            await admin.command("CLIENT", "KILL", "SKIPME", "yes")
            await asyncio.sleep(0.03)

    async def scenario() -> None:
        settings = RedisSettings(url=default_redis_url)
        connections = [Connection(settings) for _ in range(5)]
        subscriptions = [await connection.subscribe("news") for connection in connections]
        endless = [close_lines(connections[0]), *map(listen, subscriptions), *map(change, subscriptions)]
        tasks = [asyncio.create_task(work) for work in endless]
        await asyncio.gather(*(talk(connection) for connection in connections[1:] for _ in range(5)))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        for connection in connections:
            await connection.close()

    uvloop.run(scenario())


async def test_a_password_that_is_missing_is_told_alike_whatever_is_asked(short_dir: Path) -> None:
    """Long commands are refused before the server looks who asks, as a broken protocol."""
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        server.command("CONFIG", "SET", "requirepass", "secret")
        connection = Connection(RedisSettings(url=server.url, timeout_s=1))
        for words in (("PING",), ("MGET", *map(str, range(40)))):
            with pytest.raises(RedisUnavailable, match="refuses the user or password"):
                await connection.command(*words)
        await connection.close()


async def test_a_subscription_to_a_host_that_vanished_is_noticed(default_redis_url: str, short_dir: Path) -> None:
    """Nothing is closed and nothing comes: the line is given up when a sign of life stays out."""
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        connection = Connection(RedisSettings(url=proxy.url, timeout_s=1))
        subscription = await connection.subscribe("news")
        messages = subscription.messages()
        assert proxy.silence_subscriptions() == 1
        async with asyncio.timeout(30):
            assert await anext(messages) == ("news", None)
            await connection.command("PUBLISH", "news", "hello")
            assert await anext(messages) == ("news", b"hello")
        await messages.aclose()
        await connection.close()


async def test_a_silent_subscription_stays_where_it_is(default_redis_url: str) -> None:
    """Also while its reader is busy with something else."""
    connection = Connection(RedisSettings(url=default_redis_url, timeout_s=0.5))
    messages = (await connection.subscribe("news")).messages()
    reading = asyncio.ensure_future(anext(messages))
    for _ in range(2):
        await asyncio.wait([reading], timeout=3)  # as long as two checks and the time for an answer
        assert not reading.done()
        await connection.command("PUBLISH", "news", "hello")
        assert await reading == ("news", b"hello")
        await asyncio.sleep(2)
        reading = asyncio.ensure_future(anext(messages))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await connection.close()


async def test_a_password_that_was_changed_is_told_and_asked_for_without_haste(short_dir: Path) -> None:
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        connection = Connection(RedisSettings(url=server.url, timeout_s=0.5))
        messages = (await connection.subscribe("news")).messages()
        reading = asyncio.ensure_future(anext(messages))
        assert server.command("CONFIG", "SET", "requirepass", "secret") == b"+OK"
        other = Connection(RedisSettings(url=f"unix://:secret@{server.socket_path}"))
        await other.command("CONFIG", "RESETSTAT")
        await other.command("CLIENT", "KILL", "SKIPME", "yes")
        with pytest.raises(RedisUnavailable, match="refuses the user or password"):
            await connection.command("PING")
        with pytest.raises(RedisUnavailable, match="refuses the user or password"):
            await connection.subscribe("more")
        await asyncio.wait([reading], timeout=3)
        stats = await other.command("INFO", "stats")
        assert int(stats["total_connections_received"]) < 40  # two a try of which one is redis-py's own
        await other.command("CONFIG", "SET", "requirepass", "")
        async with asyncio.timeout(30):
            assert await reading == ("news", None)
        await messages.aclose()
        await connection.close()
        await other.close()
