"""Who asked is told that Redis did not answer: what was admitted all the same does not go on behind his back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.config import QueueSettings, RedisSettings, RouterSettings, WorkerSettings
from pipeline.connection import Connection
from pipeline.errors import RedisUnavailable
from pipeline.queue import PoolQueue
from tests.proxy import RedisProxy, Trap
from tests.system import POOL, request


@pytest.mark.parametrize("how", ["submit", "admit"])
async def test_a_request_whose_admission_was_not_answered_is_cancelled(
    default_redis_url: str, short_dir: Path, how: str
) -> None:
    direct = Connection(RedisSettings(url=default_redis_url))
    queue, item = PoolQueue(direct, POOL), request(3)
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        connection = Connection(RedisSettings(url=proxy.url, timeout_s=0.5))
        settings = {"queue": QueueSettings(), "router": RouterSettings(), "worker": WorkerSettings()}
        async with PoolClient(connection, POOL, "a", **settings) as client:  # type: ignore[arg-type]
            trap = proxy.arm(Trap("admit", "reply", holds=True))
            with pytest.raises(RedisUnavailable):
                await (client.submit(item) if how == "submit" else client.admit(item))
            assert trap.hit.is_set()
            trap.cut()
            for _ in range(200):
                found = await queue.attach(item.id, watch=False)
                if found is not None and found.has_ended:
                    break
                await asyncio.sleep(0.05)
            assert found is not None
            assert (found.state, found.reason) == ("cancelled", "its client left while it was admitted")
        await connection.close()
    await direct.close()


async def test_what_was_admitted_is_left_for_who_comes_again_under_its_key(
    default_redis_url: str, short_dir: Path
) -> None:
    direct = Connection(RedisSettings(url=default_redis_url))
    queue, item = PoolQueue(direct, POOL), request(3)
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        connection = Connection(RedisSettings(url=proxy.url, timeout_s=0.5))
        settings = {"queue": QueueSettings(), "router": RouterSettings(), "worker": WorkerSettings()}
        async with PoolClient(connection, POOL, "a", **settings) as client:  # type: ignore[arg-type]
            trap = proxy.arm(Trap("admit", "reply", holds=True))
            with pytest.raises(RedisUnavailable):
                await client.admit(item, idempotency_key="key", insists=True)
            assert trap.hit.is_set()
            trap.cut()
            assert await client.admit(request(3), idempotency_key="key", insists=True) == item.id
        await connection.close()  # what the client had still to say was said when it closed
    found = await queue.attach(item.id, watch=False)
    assert found is not None and found.state == "queued"
    await direct.close()
