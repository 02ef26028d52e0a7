"""Operators see a stage of one's own as they see Baton's: its lanes before it has a worker, then its workers, their orders and tasks.

The worker runs in this test's loop, so that its task ends when the test says so; who asks it are real programs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.ids import new_request_id
from pipeline.protocol import Request, TaskCall, no_input
from pipeline.queue import ENDED_STATES, Admission, LaneLook, Limits, PoolQueue
from pipeline.snapshot import take_snapshot
from tests.e2e.test_operators import baton, told
from tests.system import POOL, System
from workers import stages
from workers.control import WorkerControl
from workers.holdings import Held, Holdings
from workers.stages import NoResources, StageCapacity, Stages, StageTask
from workers.steps import StepWriter
from workers.worker import Worker

QUEUE, NAME = "words", "words-1"
LIMITS = Limits(max_waiting_tasks=9, max_waiting_tokens=9000, deadline_s=60, result_ttl_s=60)


def call(name: str) -> Request:
    request_id = new_request_id(POOL)
    return Request(
        id=request_id,
        kind="task",
        created_s=0,
        input=no_input(request_id, POOL),
        task=TaskCall(name=name, args=["text"]),
    )


async def admit(queue: PoolQueue, name: str = "hold", delay_s: float = 0.0) -> str:
    return await queue.admit(Admission(call(name), QUEUE, "default", "", delay_s=delay_s), LIMITS)


@contextlib.asynccontextmanager
async def working(system: System, go: asyncio.Event) -> AsyncIterator[asyncio.Task[None]]:
    """A worker of two tasks, `hold` ends when `go` is set; what is given is its run."""
    app, holdings = Stages(), Holdings()

    @app.task("hold", queue=QUEUE)
    async def hold(task: StageTask, text: str) -> None:
        await go.wait()

    @app.task("echo", queue=QUEUE)
    async def echo(task: StageTask, text: str) -> None:
        """Is only registered."""

    async def stop(held: Held, why: str) -> None:
        held.drop(why)

    settings, tasks = system.settings, app.on(QUEUE)
    connection = Connection(settings.redis)
    capacity = StageCapacity(QUEUE, tasks, holdings, 2, is_paused=lambda: control.is_paused)
    worker = Worker(
        connection, POOL, NAME, settings.worker, settings.queue, holdings=holdings, resources=NoResources(),
        capacity=capacity,
    )  # fmt: skip
    control = WorkerControl(connection, worker, holdings, capacity.told, redis_url=settings.redis.url)
    steps = StepWriter(worker.queue, NAME, holdings, stop=stop)
    with ThreadPoolExecutor(2) as threads:
        stages.register(worker, tasks, holdings, steps, threads)
        running = asyncio.create_task(worker.run())
        beside = [asyncio.create_task(steps.run()), asyncio.create_task(control.run())]
        try:
            await system.until(lambda: is_online(system), 20)
            yield running
        finally:
            for task in (running, *beside):
                task.cancel()
            await asyncio.gather(running, *beside, return_exceptions=True)
            await connection.close()


async def is_online(system: System) -> bool:
    return await system.alive(QUEUE) == [NAME]


async def is_in(system: System, request_id: str, *states: str) -> bool:
    state = await system.connection.command("HGET", system.keys.request(request_id), "state")
    return state is not None and state.decode() in states


async def test_a_worker_of_ones_own_stage_is_seen_and_told(default_redis_url: str) -> None:
    url, go = default_redis_url, asyncio.Event()
    async with System(url) as system:
        queue = PoolQueue(system.connection, POOL)
        first = await admit(queue)
        (lanes,) = (await told(url, "inspect", "queues")).values()  # nobody has ever worked for it
        assert [lane["lane"] for lane in lanes if lane["stage"] == QUEUE and lane["waiting"]] == ["default"]
        assert (await take_snapshot(system.connection, system.keys)).workers[QUEUE] == {}

        async with working(system, go) as running:
            await system.until(lambda: is_in(system, first, "running"), 20)
            snapshot = await take_snapshot(system.connection, system.keys)
            assert snapshot.worker_names() == [NAME]
            assert msgspec.json.decode(snapshot.workers[QUEUE][NAME])["tasks"] == ["hold", "echo"]
            status = await baton(url, "status", "-t", "20")
            assert (status.stdout, status.stderr) == (f"->  {NAME}: OK\n\n1 node online.\n", "")
            assert await told(url, "inspect", "registered", "-t", "20") == {NAME: ["echo", "hold"]}
            (active,) = (await told(url, "inspect", "active", "-t", "20"))[NAME]
            assert (active["id"], active["name"], active["lane"]) == (first, "hold", "default")
            stats = (await told(url, "inspect", "stats", "-t", "20"))[NAME]
            assert (stats["pool"]["max-concurrency"], stats["pool"]["running"]) == (2, 1)
            assert "transfer" not in stats
            (lanes,) = (await told(url, "inspect", "queues", "-d", NAME)).values()
            assert {lane["stage"] for lane in lanes} == {QUEUE}
            assert f"@{NAME}" in [lane["lane"] for lane in lanes]

            paused = await baton(url, "control", "pause", "-t", "20")
            assert paused.stdout.startswith(f"->  {NAME}: OK\n        paused")
            second = await admit(queue)
            assert f"->  {NAME}: OK, paused\n" in (await baton(url, "status", "-t", "20")).stdout
            assert await is_in(system, second, "queued")  # although it has room for it
            await baton(url, "control", "resume", "-t", "20")
            await system.until(lambda: is_in(system, second, "running"), 20)

            drained = await baton(url, "control", "drain", "-t", "20")
            assert "drains 2 tasks, then leaves" in drained.stdout
            third = await admit(queue)
            go.set()
            async with asyncio.timeout(30):
                await running
            assert await is_in(system, first, "done")
            assert await is_in(system, second, "done")
            assert await is_in(system, third, "queued")  # for the next worker
        assert await system.alive(QUEUE) == []


async def test_purge_takes_a_stage_of_ones_own_and_refuses_what_is_none(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    waiting, later = await admit(queue), await admit(queue, delay_s=3600)
    unknown = await baton(redis_url, "purge", "-f", "--stage", "wrods")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "--stage: expected one of decode, prefill, words, not wrods" in unknown.stderr
    purged = await baton(redis_url, "purge", "-f", "--stage", QUEUE)
    assert purged.stdout == "Purged 2 requests from 3 lanes.\n"
    for brief in await queue.standing([waiting, later]):
        assert brief is not None
        assert (brief.state, brief.reason) == ("cancelled", "purged")
    await connection.close()


async def test_a_dead_task_of_ones_own_is_replayed_on_its_own_queue(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    dead = await admit(queue)
    delivery = await queue.claim(QUEUE, NAME, [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000)
    assert delivery is not None
    await queue.hand_back(delivery, NAME, counts=True, max_attempts=0, why="unknown task")
    (replayed,) = (await told(redis_url, "dead", "replay", dead)).values()
    again = await queue.claim(QUEUE, NAME, [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000)
    assert again is not None
    assert again.id == replayed["replayed_as"]
    assert msgspec.msgpack.decode(again.body, type=Request).task == call("hold").task
    await connection.close()


async def test_what_ended_on_a_queue_that_never_had_a_worker_is_swept(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    ended = await admit(queue)
    await queue.cancel(ended, "revoked")
    lane = queue.keys.lane(QUEUE, "default")
    assert await connection.command("XLEN", lane) == 1
    await queue.sweep("s", interval_s=60, lease_s=30, max_attempts=3)
    assert await connection.command("XLEN", lane) == 0
    (brief,) = await queue.standing([ended])
    assert brief is not None
    assert brief.state in ENDED_STATES
    await connection.close()
