"""Lanes: higher ones go first, lower ones keep moving, and none fills what others need."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.errors import LowLaneFull, QueueFull
from pipeline.protocol import Request
from pipeline.snapshot import set_router
from pipeline.stream import Ended
from tests.system import System, collect, request

ONE_AT_A_TIME = ("engine.mock.max_num_seqs=1", "engine.mock.max_num_batched_tokens=64", "engine.mock.decode_base_ms=5")


async def read(client: PoolClient, item: Request, priority: str, deadline_s: float | None = None) -> Ended:
    return (await collect(await client.submit(item, priority=priority, deadline_s=deadline_s)))[1]


async def local_prefill(system: System, client: PoolClient) -> None:
    """Everything runs on the decode worker."""
    await set_router(system.connection, system.keys, {"max_local_prefill_length": 1000})

    async def is_known() -> bool:
        return bool((await client.snapshot()).settings)

    await system.until(is_known, 10)


async def test_low_lanes_leave_room_for_handles_of_higher_ones(default_redis_url: str, tmp_path: Path) -> None:
    arena = "transfer.arena_bytes=1310720"  # 320 blocks; a prompt of 256 tokens needs 17 to start and exports 16
    async with System(default_redis_url, arena, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")  # and nobody fetches what it exports
        low = [asyncio.create_task(read(client, request(256), "low")) for _ in range(20)]
        await system.until(lambda: handed_over(system, 9), 20)
        default = [asyncio.create_task(read(client, request(256), "default")) for _ in range(20)]
        await system.until(lambda: handed_over(system, 17), 20)
        high = [asyncio.create_task(read(client, request(256), "high")) for _ in range(5)]
        await system.until(lambda: handed_over(system, 19), 20)
        claimed = {lane: await system.counter(f"claimed:prefill:{lane}") for lane in ("low", "default", "high")}
        assert claimed == {"low": 9, "default": 8, "high": 2}
        await system.worker("decode")
        assert {ended.state for ended in await asyncio.gather(*low, *default, *high)} == {"done"}
        await system.until(system.rests, 10)


async def test_while_live_requests_come_a_prefill_worker_takes_low_ones_one_by_one(
    default_redis_url: str, tmp_path: Path
) -> None:
    slow = ("engine.mock.prefill_base_ms=300", "engine.mock.max_num_batched_tokens=2048")
    async with System(default_redis_url, *slow, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill")
        await system.worker("decode")

        async def most_at_once() -> int:
            """Of eight low requests, how many run at once."""
            reading = [asyncio.create_task(read(client, request(200, max_tokens=1), "low")) for _ in range(8)]
            most = 0
            while not all(one.done() for one in reading):
                most = max(most, await system.counter("running:prefill:low"))
                await asyncio.sleep(0.01)
            assert {one.result().state for one in reading} == {"done"}
            return most

        assert await most_at_once() > 3  # nobody else comes: all fit one step
        assert (await read(client, request(200, max_tokens=1), "default")).state == "done"
        assert await most_at_once() == 1
        await system.until(system.rests, 10)


async def handed_over(system: System, count: int) -> bool:
    return await system.counter("handovers") == count


async def test_a_task_larger_than_its_lanes_share_starts_when_the_room_is_empty(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, "transfer.arena_bytes=131072", log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            assert (await read(client, request(400), "low", deadline_s=20)).state == "done"
            assert await system.counter("handovers") == 1


async def test_within_a_lane_first_come_first_served_and_lanes_by_priority(
    default_redis_url: str, tmp_path: Path
) -> None:
    settings = (*ONE_AT_A_TIME, "queue.guard_ms=3600000")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        items = [request(10, max_tokens=4) for _ in range(12)]
        lanes = ["low", "default", "high", "default"] * 3
        reading = []
        for item, lane in zip(items, lanes, strict=True):
            stream = await client.submit(item, priority=lane)
            reading.append(asyncio.create_task(collect(stream)))
        await system.worker("decode")  # without a prefill worker all goes on here, moved in the order of each lane
        ends = [ended for _, ended in await asyncio.gather(*reading)]
        order = sorted(range(12), key=lambda i: ends[i].timeline.claimed_decode)
        assert [lanes[i] for i in order] == ["high"] * 3 + ["default"] * 6 + ["low"] * 3
        for _, group in itertools.groupby(order, key=lambda i: lanes[i]):
            members = list(group)
            assert members == sorted(members)


async def test_the_lowest_lane_keeps_moving_under_a_load_of_higher_ones(default_redis_url: str, tmp_path: Path) -> None:
    settings = (*ONE_AT_A_TIME, "queue.guard_ms=100")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("decode")
        await local_prefill(system, client)
        high = [asyncio.create_task(read(client, request(10, max_tokens=10), "high")) for _ in range(60)]
        low = [asyncio.create_task(read(client, request(10, max_tokens=10), "low")) for _ in range(2)]
        high_ends, low_ends = await asyncio.gather(*high), await asyncio.gather(*low)
        overtaken = [
            sum(end.timeline.claimed_decode > one.timeline.claimed_decode for end in high_ends) for one in low_ends
        ]
        assert min(overtaken) > 0, "the low lane waited until the high one was empty"
        assert max(overtaken) < 60, "the low lane went before the high one"


@pytest.mark.parametrize(("priority", "kind"), [("low", LowLaneFull), ("default", QueueFull), ("high", QueueFull)])
async def test_each_lane_has_limits_of_its_own(default_redis_url: str, priority: str, kind: type[QueueFull]) -> None:
    settings = (f"queue.{priority}.max_waiting_tasks=2", f"queue.{priority}.deadline_s=1.5", "queue.deadline_s=60")
    async with System(default_redis_url, *settings) as system, system.client() as client:
        waiting = [asyncio.create_task(read(client, request(5), priority)) for _ in range(2)]
        await system.until(lambda: admitted(system, 2), 10)
        with pytest.raises(QueueFull) as refused:
            await client.submit(request(5), priority=priority)
        assert type(refused.value) is kind
        assert refused.value.retry_after_s >= 1
        other = "high" if priority != "high" else "low"
        free = await client.submit(request(5), priority=other)
        assert {ended.state for ended in await asyncio.gather(*waiting)} == {"expired"}  # by their lane's deadline
        await free.cancel()
        assert (await collect(free))[1].state == "cancelled"


async def admitted(system: System, count: int) -> bool:
    return await system.counter("admitted") == count
