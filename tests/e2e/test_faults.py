"""What happens in the wrong moment: nothing leaks, nobody dies of it, nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.queue import Admission, LaneLook, Limits, PoolQueue, Verdict
from pipeline.redis_server import RedisServer
from tests.proxy import RedisProxy, Trap
from tests.system import POOL, System, collect, request

pytestmark = pytest.mark.faults

LIMITS = Limits(max_waiting_tasks=9, max_waiting_tokens=9000, deadline_s=60, result_ttl_s=60)
MANY = Limits(max_waiting_tasks=99, max_waiting_tokens=99_999, deadline_s=60, result_ttl_s=60)


async def figure(system: System, role: str, name: str) -> int:
    """What the only worker of a role last said of its engine."""
    (worker,) = await system.alive(role)
    info = await system.connection.command("HGET", system.keys.worker(worker), "info")
    return int(json.loads(info)["stats"][name])


async def figure_is(system: System, role: str, name: str, value: int) -> bool:
    return await figure(system, role, name) == value


async def test_the_engine_stops_at_a_stop_string(default_redis_url: str, tmp_path: Path) -> None:
    slow = ("worker.lease_s=1", "engine.mock.decode_base_ms=20")
    async with System(default_redis_url, *slow, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            item = request(30, n=2, max_tokens=20_000, stop=["a", "e", "i", "o"])
            tokens, ended = await collect(await client.submit(item), 2)
            assert ended.state == "done"
            assert all(len(choice) < 20_000 for choice in tokens)
            await system.until(lambda: figure(system, "decode", "output_tokens"), 10)  # it has told of this request
            await system.until(lambda: figure_is(system, "decode", "running", 0), 10)


async def test_blocks_are_freed_when_a_cancellation_overtakes_the_handover(
    default_redis_url: str, short_dir: Path
) -> None:
    async with (
        RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy,
        System(default_redis_url, "worker.lease_s=1") as system,
    ):
        system.overrides.append(f"redis.url={proxy.url}")  # of the worker only
        await system.worker("prefill")
        async with system.client() as client:
            handover = proxy.arm(Trap("handover", "before", holds=True))
            stream = await client.submit(request(50))
            async with asyncio.timeout(10):
                await handover.hit.wait()
            await system.until(lambda: figure_is(system, "prefill", "handles_exported", 1), 10)
            await stream.cancel("test")
            assert (await collect(stream))[1].state == "cancelled"
            await asyncio.sleep(0.2)
            handover.release()
            await system.until(lambda: figure_is(system, "prefill", "handles_exported", 0), 10)


async def test_workers_outlive_a_redis_that_takes_no_writes(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, "redis.timeout_s=1", log_dir=tmp_path) as system:
        prefill, decode = await system.worker("prefill"), await system.worker("decode")
        logs = list(tmp_path.glob("workers-*.log"))

        def said() -> bool:
            return all("cannot claim, trying again" in path.read_text() for path in logs)

        async with system.client() as client:
            await system.connection.command("REPLICAOF", "127.0.0.1", "1")  # a fail-over that went to another
            try:
                await system.until(lambda: said() or prefill.poll() is not None or decode.poll() is not None, 20)
            finally:
                await system.connection.command("REPLICAOF", "NO", "ONE")
            assert (prefill.poll(), decode.poll()) == (None, None)
            assert (await collect(await client.submit(request(30))))[1].state == "done"


async def test_what_waits_is_claimed_and_read_while_memory_is_full(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url, timeout_s=1))
    queue = PoolQueue(connection, POOL)
    item = request(30)
    await queue.admit(Admission(item, "decode", "default", "a"), LIMITS)
    await connection.command("CONFIG", "SET", "maxmemory", "1mb")
    try:
        assert await queue.attach(item.id, watch=True) is not None
        delivery = await queue.claim(
            "decode", "d", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000
        )
        assert delivery is not None
        assert await queue.fetched(delivery, "d") is Verdict.ACCEPTED
    finally:
        await connection.command("CONFIG", "SET", "maxmemory", "0")
        await connection.close()


async def test_what_waits_on_the_lane_of_a_worker_that_leaves_goes_to_others(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    for name in ("d1", "d2"):
        await queue.renew("decode", name, b"", 30)
    item = request(30)
    await queue.admit(Admission(item, "decode", "@d1", "a"), LIMITS)
    await queue.leave("decode", "d1")
    await queue.leave("decode", "d1")
    await queue.sweep("d2", interval_s=0.001, lease_s=30, max_attempts=3)
    delivery = await queue.claim(
        "decode", "d2", [LaneLook("@d2", 9), LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000
    )
    assert delivery is not None
    assert delivery.id == item.id
    await connection.close()


async def test_an_engine_that_waits_for_redis_is_not_stalled(
    default_redis_server: RedisServer, default_redis_url: str, tmp_path: Path
) -> None:
    # a busy machine may keep an engine waiting for a second
    fast_limits = ("worker.stall_s=2", "redis.timeout_s=1", "engine.mock.decode_base_ms=10")
    async with System(default_redis_url, *fast_limits, log_dir=tmp_path) as system:
        await system.worker("decode")
        (path,) = tmp_path.glob("workers-decode-*.log")
        async with system.client() as client:
            item = request(30, max_tokens=60)
            reading = asyncio.create_task(collect(await client.submit(item)))
            await system.until(lambda: system.counter("claimed:decode:default"), 20)
            default_redis_server.process.send_signal(signal.SIGSTOP)
            try:
                await system.until(lambda: path.read_text().count("step not written") >= 4, 30)
            finally:
                default_redis_server.process.send_signal(signal.SIGCONT)
            assert (await reading)[1].state == "done"
            assert "engine stalled" not in path.read_text()


async def test_a_worker_drains_although_redis_is_away(
    default_redis_server: RedisServer, default_redis_url: str, tmp_path: Path
) -> None:
    slow = ("worker.drain_s=0.5", "redis.timeout_s=1", "engine.mock.decode_base_ms=20")
    async with System(default_redis_url, *slow, log_dir=tmp_path) as system:
        decode = await system.worker("decode")
        async with system.client() as client:
            stream = await client.submit(request(30, max_tokens=5000))
            await system.until(lambda: system.counter("claimed:decode:default"), 20)
            default_redis_server.process.send_signal(signal.SIGSTOP)
            try:
                decode.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(decode.wait, 40) == 0
            finally:
                default_redis_server.process.send_signal(signal.SIGCONT)
            await stream.cancel("test")


async def test_tasks_that_never_fit_a_worker_hold_nobody_up(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    for blocks in (100,) * 40 + (5,):
        item = request(16 * (blocks - 2) + 3)
        await queue.admit(Admission(item, "decode", "default", "a"), MANY)
    small = await queue.claim("decode", "d1", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000)
    assert small is not None
    assert small.id == item.id
    assert await queue.hand_back(small, "d1", counts=False, max_attempts=3, why="test") == "parked"
    again = await queue.claim("decode", "d1", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000)
    assert again is not None
    assert again.id == item.id
    for _ in range(40):  # and a larger worker finds every one of them
        large = await queue.claim(
            "decode", "d2", [LaneLook("default", 100)], total_blocks=100, block_size=16, overtake_ms=1000
        )
        assert large is not None
    await connection.close()


async def test_what_no_prefill_worker_can_export_is_prefilled_where_it_is_decoded(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, "transfer.arena_bytes=65536", log_dir=tmp_path) as system:  # 16 blocks
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            for prompt, handovers in ((100, 1), (500, 1)):
                _, ended = await collect(await client.submit(request(prompt), deadline_s=20))
                assert ended.state == "done"
                assert await system.counter("handovers") == handovers
