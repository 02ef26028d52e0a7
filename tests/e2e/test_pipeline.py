"""Requests through real worker processes: the whole way, and back to an empty pool."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.protocol import Request
from pipeline.snapshot import set_router, take_snapshot
from tests.e2e.processes import children
from tests.system import System, collect, request

pytestmark = pytest.mark.faults


async def run(client: PoolClient, item: Request) -> list[list[int]]:
    tokens, ended = await collect(await client.submit(item), item.input.sampling_options.n)
    assert ended.state == "done", ended
    assert ended.usage.completion_tokens == sum(map(len, tokens))
    return tokens


async def test_requests_cross_both_stages_and_leave_nothing(redis_url: str, tmp_path: Path) -> None:
    async with System(redis_url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            items = [request(1 + 13 * i, n=1 + i % 3, max_tokens=1 + i % 20) for i in range(40)]
            answers = await asyncio.gather(*(run(client, item) for item in items))
            for item, tokens in zip(items, answers, strict=True):
                assert [len(choice) for choice in tokens] == [item.input.stop_conditions.max_tokens] * len(tokens)
            again = await run(client, request(items[5].input.token_ids, n=3, max_tokens=6))
            assert again == answers[5]
            await system.until(system.rests, 10)
            counters = (await take_snapshot(system.connection, system.keys)).counters
            assert counters["handovers"] == counters["ended:done"] == 41
            assert not [name for name in counters if name.startswith("kv_recomputed:")]


async def test_with_only_decode_workers_everything_goes_on_locally(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system, system.client() as client:
        waiting = await client.submit(request(50))  # no worker at all: it waits on the prefill lane
        await system.worker("decode")
        tokens, ended = await collect(waiting)
        assert (ended.state, len(tokens[0])) == ("done", 16)
        assert ended.timeline.handover == 0
        direct = await run(client, request(50))
        assert direct == tokens
        await system.until(system.rests, 10)


async def test_router_settings_change_at_run_time_for_all_replicas(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client("api-a") as a, system.client("api-b") as b:
            for client in (a, b):
                await run(client, request(100))
            assert await system.counter("handovers") == 2
            await set_router(system.connection, system.keys, {"max_local_prefill_length": 100})
            await system.until(lambda: all_know(a, b), 5)
            for client in (a, b):
                await run(client, request(100))
            assert await system.counter("handovers") == 2
            await run(a, request(101))
            assert await system.counter("handovers") == 3


async def all_know(*clients: PoolClient) -> bool:
    return all([(await client.snapshot()).settings for client in clients])


async def test_without_any_worker_a_request_waits_until_its_deadline(default_redis_url: str) -> None:
    async with System(default_redis_url) as system, system.client() as client:
        tokens, ended = await collect(await client.submit(request(50), deadline_s=0.7))
        assert (ended.state, ended.stage, tokens) == ("expired", "prefill", [[]])
        await system.until(system.rests, 10)


async def test_a_cancelled_request_frees_its_blocks(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, "engine.mock.decode_base_ms=20", log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            stream = await client.submit(request(500, max_tokens=2000))
            async with stream:
                async for _ in stream:
                    break
                await stream.cancel("test")
                async for _ in stream:
                    pass
            assert stream.ended is not None
            assert stream.ended.state == "cancelled"
            await system.until(system.rests, 10)
            assert (await run(client, request(20)))[0]


async def test_a_killed_decode_worker_is_replaced_without_a_token_lost_or_doubled(
    redis_url: str, tmp_path: Path
) -> None:
    async with System(redis_url, "worker.lease_s=2", "engine.mock.decode_base_ms=20", log_dir=tmp_path) as system:
        await system.worker("prefill")
        first = await system.worker("decode")
        async with system.client() as client:
            undisturbed = await run(client, request(100, n=2, max_tokens=40))
            items = [request(100, n=2, max_tokens=40) for _ in range(4)]
            streams = [await client.submit(item) for item in items]
            reading = [asyncio.create_task(collect(stream, 2)) for stream in streams]
            await asyncio.sleep(0.4)
            await system.worker("decode")
            first.kill()
            for tokens, ended in await asyncio.gather(*reading):
                assert ended.state == "done", ended
                assert tokens == undisturbed
            await system.until(system.rests, 10)


async def test_a_zombie_writes_nothing_after_its_lease(redis_url: str, tmp_path: Path) -> None:
    """Unseeded sampling: two workers give different tokens, so a single one of the zombie's would show."""
    async with System(redis_url, "worker.lease_s=2", "engine.mock.decode_base_ms=30", log_dir=tmp_path) as system:
        await system.worker("prefill")
        zombie = await system.worker("decode")
        async with system.client() as client:
            item = request(64, max_tokens=100, temperature=1.0)
            stream = await client.submit(item)
            reading = asyncio.create_task(collect(stream))
            await system.until(lambda: system.logged(item.id, 10), 20)
            freeze(zombie)
            await system.worker("decode")
            await system.until(lambda: taken_over(system, item.id), 20)
            zombie.send_signal(signal.SIGCONT)  # it has steps in hand
            for child in children(zombie):
                os.kill(child, signal.SIGCONT)
            tokens, ended = await reading
            assert ended.state == "done", ended
            assert len(tokens[0]) == 100
            standing = await client.queue.attach(item.id, watch=False)
            assert standing is not None
            assert standing.log.tokens == tokens
            await system.until(system.rests, 10)
    log = "".join(path.read_text() for path in tmp_path.glob("workers-decode-*.log"))
    assert "dropped" in log  # the zombie noticed


async def test_a_worker_that_slept_alone_takes_its_request_again(default_redis_url: str, tmp_path: Path) -> None:
    """The same worker gets a second delivery; what it computed for the first one is not written under the second's epoch."""
    async with System(
        default_redis_url, "worker.lease_s=1", "engine.mock.decode_base_ms=20", log_dir=tmp_path
    ) as system:
        await system.worker("prefill")
        sleeper = await system.worker("decode")
        async with system.client() as client:
            item = request(64, n=2, max_tokens=80, temperature=1.0)
            reading = asyncio.create_task(collect(await client.submit(item), 2))
            await system.until(lambda: system.logged(item.id, 8), 20)
            sleeper.send_signal(signal.SIGSTOP)  # its engine goes on
            await system.until(lambda: parked(system, item.id), 20)
            sleeper.send_signal(signal.SIGCONT)
            tokens, ended = await reading
            assert ended.state == "done", ended
            assert [len(choice) for choice in tokens] == [80, 80]
            standing = await client.queue.attach(item.id, watch=False)
            assert standing is not None
            assert standing.log.tokens == tokens
            assert await taken_over(system, item.id)


async def parked(system: System, request_id: str) -> bool:
    return bool(await system.connection.command("HGET", system.keys.request(request_id), "state") == b"queued")


def freeze(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker in mid-step: its parent at once, its engine a moment later, so that outputs wait between them."""
    process.send_signal(signal.SIGSTOP)
    for child in children(process):
        os.kill(child, signal.SIGSTOP)


async def taken_over(system: System, request_id: str) -> bool:
    epoch = int(await system.connection.command("HGET", system.keys.request(request_id), "epoch"))
    return epoch > 2


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_draining_worker_finishes_what_it_holds(
    default_redis_url: str, tmp_path: Path, signal_number: signal.Signals
) -> None:
    async with System(default_redis_url, "engine.mock.decode_base_ms=10", log_dir=tmp_path) as system:
        prefill = await system.worker("prefill")
        decode = await system.worker("decode")
        async with system.client() as client:
            reading = [asyncio.create_task(run(client, request(30, max_tokens=60))) for _ in range(4)]
            await system.until(lambda: claimed(system, 4), 20)
            for process in (prefill, decode):
                process.send_signal(signal_number)
            assert [len(tokens[0]) for tokens in await asyncio.gather(*reading)] == [60] * 4
            assert await asyncio.to_thread(prefill.wait, 20) == 0
            assert await asyncio.to_thread(decode.wait, 20) == 0
            assert await system.alive("prefill") == await system.alive("decode") == []


async def claimed(system: System, count: int) -> bool:
    return await system.counter("claimed:decode:default") >= count
