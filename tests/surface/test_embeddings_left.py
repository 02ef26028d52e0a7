"""Requests for embeddings that come to nothing: whatever the reason, they do as a whole, and nothing of them stays in Redis."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx

from pipeline.cli.keys import new_key
from pipeline.key_store import KeyStore
from pipeline.redis_server import RedisServer
from tests.serving import serving
from tests.surface.test_embeddings import PATH, SETTINGS, TEXTS, ask
from tests.system import POOL


async def test_where_one_task_is_refused_the_others_are_cancelled(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "queue.max_waiting_tasks=2")
    async with serving(default_redis_server, tmp_path, *settings, stages="") as served:
        refused = await ask(served, input=[[3]] * 2048, priority=-1)  # three tasks, and nobody takes them
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await served.ended("cancelled"), await served.system.counter("admitted")) == (2, 2)
        await served.system.until(served.rests)


async def test_a_server_that_leaves_answers_and_leaves_nothing_behind(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, *SETTINGS, "api.shutdown_grace_s=0.3", stages="") as served:
        asking = asyncio.create_task(ask(served, input=TEXTS))

        async def waits() -> bool:
            return await served.system.counter("waiting:embed:default") == 1

        await served.system.until(waits)
        served.api.send_signal(signal.SIGTERM)
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert await asyncio.to_thread(served.api.wait, 20) == 0
        await served.system.api()  # the entry of what was cancelled is swept
        await served.system.until(served.rests)


async def test_a_key_whose_slots_are_taken_gets_no_vectors_and_one_request_of_several_tasks_is_one(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "api.auth=required", "api.keys_refresh_s=0.1")
    async with serving(default_redis_server, tmp_path, *settings, stages="") as served, served.http() as http:
        made = new_key("some", expires_in=None, concurrent_requests=1)
        await KeyStore(served.system.connection).put(made.key)

        async def post(timeout_s: float) -> httpx.Response:
            headers = {"authorization": f"Bearer {made.secret}", "x-request-timeout": str(timeout_s)}
            return await http.post(PATH, json={"model": POOL, "input": [[3]] * 2048}, headers=headers)

        async def waits() -> bool:
            return await served.system.counter("waiting:embed:default") == 3

        first = asyncio.create_task(post(3))
        await served.system.until(waits)
        refused = await post(30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
        assert (await first).status_code == 504  # nobody takes its tasks
        assert await served.system.counter("admitted") == 3
