"""The tests' proxy catches the call that it was told to catch, where it was told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.queue import Admission, Limits, PoolQueue
from tests.proxy import RedisProxy, Side, Trap, script_shas
from tests.system import POOL, request

LIMITS = Limits(max_waiting_tasks=9, max_waiting_tokens=9000, deadline_s=60, result_ttl_s=60)


@contextlib.asynccontextmanager
async def through_proxy(redis_url: str, folder: Path) -> AsyncIterator[tuple[RedisProxy, Connection, PoolQueue]]:
    async with RedisProxy(redis_url.removeprefix("unix://"), folder) as proxy:
        direct, behind = Connection(RedisSettings(url=redis_url)), Connection(RedisSettings(url=proxy.url))
        yield proxy, direct, PoolQueue(behind, POOL)
        await direct.close()
        await behind.close()


async def admit(queue: PoolQueue) -> str:
    item = request(3)
    await queue.admit(Admission(item, "decode", "default", "a"), LIMITS)
    return item.id


@pytest.mark.parametrize(("side", "ran"), [("before", 0), ("reply", 1)])
async def test_a_held_call_has_run_or_not(default_redis_url: str, short_dir: Path, side: Side, ran: int) -> None:
    async with through_proxy(default_redis_url, short_dir) as (proxy, direct, queue):
        trap = proxy.arm(Trap("admit", side, holds=True))
        admitting = asyncio.create_task(admit(queue))
        async with asyncio.timeout(10):
            await trap.hit.wait()
        await direct.command("PING")
        assert await direct.command("EXISTS", queue.keys.counters()) == ran
        assert not admitting.done()
        trap.release()
        assert await direct.command("EXISTS", queue.keys.request(await admitting)) == 1


async def test_the_nth_call_that_is_wanted_is_caught(default_redis_url: str, short_dir: Path) -> None:
    async with through_proxy(default_redis_url, short_dir) as (proxy, _, queue):
        trap = proxy.arm(Trap("end", "before", nth=2, wants=lambda arguments, _: arguments[1] == b"done"))
        ids = [await admit(queue) for _ in range(4)]
        for request_id, state in zip(ids[:3], ("done", "cancelled", "failed"), strict=True):
            await queue.end(request_id, state)
        assert not trap.hit.is_set()
        await queue.end(ids[3], "done")  # the line is cut once, and the call is repeated
        assert trap.hit.is_set()
        assert trap.arguments[0] == ids[3].encode()


async def test_an_answer_without_what_is_wanted_passes(default_redis_url: str, short_dir: Path) -> None:
    async with through_proxy(default_redis_url, short_dir) as (proxy, _, queue):
        trap = proxy.arm(Trap("attach", "reply", wants=lambda _, answer: bool(answer)))
        assert await queue.attach("nobody", watch=False) is None
        assert not trap.hit.is_set()
        assert await queue.attach(await admit(queue), watch=False) is not None
        assert trap.hit.is_set()


async def test_subscriptions_are_cut_and_come_back(default_redis_url: str, short_dir: Path) -> None:
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        connection = Connection(RedisSettings(url=proxy.url))
        subscription = await connection.subscribe("news")
        messages = subscription.messages()
        assert proxy.cut_subscriptions() == 1
        async with asyncio.timeout(10):
            assert await anext(messages) == ("news", None)  # subscribed anew
        await connection.close()


def test_every_script_is_known_by_its_digest() -> None:
    assert {"admit", "claim", "step", "end"} <= set(script_shas().values())
    assert not any(name.startswith("_") for name in script_shas().values())
