"""An API process that ends without a word: nothing goes on for nobody, and what must go on does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.redis_server import RedisServer
from tests.proxy import RedisProxy, Trap
from tests.serving import STREAM, serving
from tests.system import System, collect, request

pytestmark = pytest.mark.faults

SETTINGS = ("worker.lease_s=1.5", "engine.mock.decode_base_ms=20")


async def test_requests_of_a_killed_api_are_cancelled_when_its_lease_is_over(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, *SETTINGS) as served:
        await served.system.api()  # another replica, which sweeps
        async with served.http() as http:
            body = {**STREAM, "max_tokens": 2000}
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                await served.system.until(lambda: served.running(1), 20)
                served.api.kill()
        await served.system.until(lambda: cancelled(served.system, 1), 20)
        await served.system.until(served.rests, 20)
        assert not await served.system.connection.command("KEYS", served.system.keys.root + "served:*")


async def cancelled(system: System, count: int) -> bool:
    return await system.counter("ended:cancelled") == count


async def test_requests_that_must_not_depend_on_their_client_go_on(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client("reader") as client:
        await system.worker("prefill")
        await system.worker("decode")
        item = request(20, max_tokens=150)
        async with system.client("gone") as submitter:
            await submitter.submit(item, linger_s=None)
            await system.connection.command("ZADD", system.keys.alive("api"), 1, "gone")  # as if it had been killed
        tokens, ended = await collect(await client.attach(item.id, 1))
        assert (ended.state, len(tokens[0])) == ("done", 150)


async def test_a_submit_that_is_given_up_leaves_no_request(default_redis_url: str, short_dir: Path) -> None:
    """The client leaves while its request is on the way to Redis."""
    async with (
        RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy,
        System(default_redis_url) as system,
    ):
        behind = Connection(RedisSettings(url=proxy.url))
        async with system.client("other") as other, system.client(connection=behind) as client:
            await (await other.submit(request(5))).cancel()  # the script is loaded
            item = request(6)
            trap = proxy.arm(Trap("admit", "before", holds=True))
            submitting = asyncio.create_task(client.submit(item))
            await trap.hit.wait()
            submitting.cancel()
            await asyncio.wait([submitting])
            assert submitting.cancelled()
            trap.release()
            await system.until(lambda: admitted(system, 2), 10)
            await system.until(system.rests, 10)
        await behind.close()


async def admitted(system: System, count: int) -> bool:
    return await system.counter("admitted") == count
