"""Whatever dies, a request that was accepted goes on with the tokens that it would have had."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.redis_server import RedisServer
from pipeline.snapshot import take_snapshot
from tests.e2e.processes import children
from tests.system import System, collect, request

pytestmark = pytest.mark.faults

SETTINGS = ("worker.lease_s=2", "engine.mock.decode_base_ms=20")


async def undisturbed(client: PoolClient, **fields: int) -> list[list[int]]:
    item = request(100, **fields)
    tokens, ended = await collect(await client.submit(item), item.input.sampling_options.n)
    assert ended.state == "done", ended
    return tokens


async def state_is(system: System, request_id: str, stage: str, state: str) -> bool:
    got = await system.connection.command("HMGET", system.keys.request(request_id), "stage", "state")
    return bool(got == [stage.encode(), state.encode()])


async def knows_prefill(client: PoolClient) -> bool:
    return (await client.snapshot()).load().prefill_alive == 1


async def test_a_prefill_worker_that_dies_while_it_computes(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("decode")
        spare = await system.worker("prefill")
        expected = await undisturbed(client, max_tokens=20)
        spare.terminate()
        await asyncio.to_thread(spare.wait, 20)
        doomed = await system.worker("prefill", "engine.mock.prefill_base_ms=60000")
        await system.until(lambda: knows_prefill(client), 5)
        item = request(100, max_tokens=20)
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: state_is(system, item.id, "prefill", "running"), 20)
        await system.worker("prefill")
        doomed.kill()
        tokens, ended = await reading
        assert (ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_prefill_worker_that_dies_after_the_handover(default_redis_url: str, tmp_path: Path, n: int) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        doomed = await system.worker("prefill")
        reference = await system.worker("decode")
        expected = await undisturbed(client, n=n, max_tokens=20)
        reference.terminate()
        await asyncio.to_thread(reference.wait, 20)
        item = request(100, n=n, max_tokens=20)
        reading = asyncio.create_task(collect(await client.submit(item), n))
        await system.until(lambda: state_is(system, item.id, "decode", "queued"), 20)
        doomed.kill()  # the blocks of the request go with it as soon as the next process starts
        await asyncio.to_thread(doomed.wait)
        await system.worker("decode")
        tokens, ended = await reading
        assert (ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)
        assert await system.counter("kv_recomputed:gone") == 1


async def test_both_workers_die_and_only_a_decode_worker_comes_back(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        workers = [await system.worker("prefill"), await system.worker("decode")]
        expected = await undisturbed(client, n=2, max_tokens=60)
        items = [request(100, n=2, max_tokens=60) for _ in range(3)]
        reading = [asyncio.create_task(collect(await client.submit(item), 2)) for item in items]
        await system.until(lambda: system.logged(items[0].id, 10), 20)
        for worker in workers:
            worker.kill()
        await system.worker("decode")
        for tokens, ended in await asyncio.gather(*reading):
            assert (ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
async def test_an_engine_that_dies_or_hangs_under_a_living_worker(
    default_redis_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    settings = (*SETTINGS, "worker.stall_s=1.5", "worker.lease_s=30")  # the lease is not what saves it
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        worker = await system.worker("decode")
        expected = await undisturbed(client, n=2, max_tokens=60)
        items = [request(100, n=2, max_tokens=60) for _ in range(3)]
        reading = [asyncio.create_task(collect(await client.submit(item), 2)) for item in items]
        await system.until(lambda: system.logged(items[0].id, 10), 20)
        [engine] = children(worker)
        os.kill(engine, number)
        for tokens, ended in await asyncio.gather(*reading):
            assert (ended.state, tokens) == ("done", expected)
        assert children(worker) != [engine]
        await system.until(system.rests, 10)


async def test_redis_dies_in_the_middle_of_streams_and_comes_back(short_dir: Path, tmp_path: Path) -> None:
    server = RedisServer.start(short_dir)
    server.wait_ready()
    try:
        async with System(server.url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
            await system.worker("prefill")
            await system.worker("decode")
            expected = await undisturbed(client, n=2, max_tokens=60)
            items = [request(100, n=2, max_tokens=60) for _ in range(3)]
            reading = [asyncio.create_task(collect(await client.submit(item), 2)) for item in items]
            await system.until(lambda: system.logged(items[0].id, 10), 20)
            server.process.kill()
            server.stop()
            server = RedisServer.start(short_dir)
            server.wait_ready()
            for tokens, ended in await asyncio.gather(*reading):
                assert (ended.state, tokens) == ("done", expected)
            await system.until(system.rests, 10)
    finally:
        server.stop()


async def test_a_worker_leaves_also_when_redis_is_gone(short_dir: Path, tmp_path: Path) -> None:
    server = RedisServer.start(short_dir)
    server.wait_ready()
    try:
        settings = (*SETTINGS, "worker.drain_s=1", "redis.timeout_s=1")
        async with System(server.url, *settings, log_dir=tmp_path) as system:
            workers = [await system.worker("prefill"), await system.worker("decode")]
            async with system.client() as client:
                item = request(100, max_tokens=1000)
                stream = await client.submit(item)
                await system.until(lambda: system.logged(item.id, 5), 20)
                server.process.kill()
                for worker in workers:
                    worker.terminate()
                for worker in workers:
                    await asyncio.to_thread(worker.wait, 30)
                async with stream:
                    pass
    finally:
        server.stop()


async def test_blocks_are_kept_for_as_long_as_their_request_waits(default_redis_url: str, tmp_path: Path) -> None:
    """Several leases long nobody decodes: the owner asks each quarter lease whether its handles are still wanted, and they are."""
    async with System(default_redis_url, "worker.lease_s=0.8", log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        item = request(100, n=2, max_tokens=20)
        reading = asyncio.create_task(collect(await client.submit(item), 2))
        await system.until(lambda: state_is(system, item.id, "decode", "queued"), 20)
        await asyncio.sleep(3)
        await system.worker("decode")
        _, ended = await reading
        assert ended.state == "done"
        counters = (await take_snapshot(system.connection, system.keys)).counters
        assert [name for name in counters if name.startswith("kv_recomputed")] == []
        await system.until(system.rests, 10)


SKEWED = """
import time
_now = time.time
time.time = lambda: _now() + {offset_s}
"""


async def test_clocks_of_hosts_may_differ(default_redis_url: str, tmp_path: Path) -> None:
    """Leases, deadlines and delays are told by the clock of Redis alone: workers whose clocks are hours apart serve all the same."""
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        for stage, offset_s in (("prefill", 7200), ("decode", -7200)):
            (tmp_path / stage).mkdir()
            (tmp_path / stage / "sitecustomize.py").write_text(SKEWED.format(offset_s=offset_s))
            await system.worker(stage, path=tmp_path / stage)
        items = [request(100, n=2, max_tokens=60) for _ in range(3)]
        answers = await asyncio.gather(*[collect(await client.submit(item, deadline_s=30), 2) for item in items])
        assert {ended.state for _, ended in answers} == {"done"}
        for item in items:
            assert (
                await system.connection.command("HGET", system.keys.request(item.id), "epoch") == b"2"
            )  # a claim a stage
        _, late = await collect(await client.submit(request(100, max_tokens=20_000), deadline_s=1.5))
        assert late.state == "expired"
        await system.until(system.rests, 10)
