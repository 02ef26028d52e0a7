"""What a batch worker does with rq: its own jobs and no others, for rq's own tools to see."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Callback, Queue
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from pipeline.batches.jobs import RUN_BATCH, BatchJob, BatchQueue
from pipeline.batches.record import IDS
from pipeline.config import RedisSettings, RqSettings
from pipeline.keys import batch_lease
from pipeline.redis_server import RedisServer
from tests.batches.running import batching, text_line

EVIL = "tests.batches.injected.call"
QUEUE = RqSettings().queue
SLOW = ("engine.mock.decode_base_ms=20", "batches.max_in_flight=4")


class Pickled:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


class Injector:
    """Writes jobs as somebody does who can write to Redis."""

    def __init__(self, url: str, marker: Path) -> None:
        self.connection = redis.Redis.from_url(url)
        self.queue = Queue(QUEUE, connection=self.connection, serializer=JSONSerializer)
        self.command = f"touch {marker}"

    def job(self, function: str, *args: Any, **kwargs: Any) -> Job:
        return self.queue.enqueue_call(function, args=args, kwargs=kwargs, failure_ttl=600)

    def raw(self, field: str, value: bytes, job_id: str | None = None) -> Job:
        """A job of ours, but for one field of its record."""
        kwargs = {"batch_id": IDS.new(1)}
        job = Job.create(RUN_BATCH, kwargs=kwargs, connection=self.connection, serializer=JSONSerializer, origin=QUEUE)
        job.set_status(JobStatus.QUEUED)
        job.save()
        self.connection.hset(job.key, field, value)
        self.queue.push_job_id(job.id)
        return job

    def refused(self) -> dict[str, Job]:
        """Jobs that must not run, by what they are."""
        known = IDS.new(2)
        pickled = Queue(QUEUE, connection=self.connection).enqueue_call(
            os.system, args=(self.command,), failure_ttl=600
        )
        unpickles = pickle.dumps(Pickled(self.command))
        return {
            "os.system": self.job("os.system", self.command),
            "a module that does something when it is imported": self.job(EVIL),
            "another function of the worker": self.job("workers.batch.job.configure", None),
            "a function inside ours": self.job(RUN_BATCH + ".__globals__", batch_id=known),
            "ours with an argument": self.job(RUN_BATCH, known),
            "ours with another id": self.job(RUN_BATCH, batch_id="../../etc/passwd"),
            "ours with an id that is no text": self.job(RUN_BATCH, batch_id=[known]),
            "ours with more": self.job(RUN_BATCH, batch_id=known, settings={}),
            "ours of an object": self.raw("data", json.dumps([RUN_BATCH, "os", [], {"batch_id": known}]).encode()),
            "ours with keywords that are none": self.raw("data", json.dumps([RUN_BATCH, None, [], [known]]).encode()),
            "pickled by rq": pickled,
            "a pickle": self.raw("data", unpickles),
            "a packed pickle": self.raw("data", zlib.compress(unpickles)),
            "nothing": self.raw("data", b""),
        }

    def harmless(self) -> dict[str, Job]:
        """Jobs of ours, of batches that are not there, with things around them that nobody looks at."""
        unpickles = pickle.dumps(Pickled(self.command))
        called = {"on_success": Callback(EVIL), "on_failure": Callback(EVIL), "on_stopped": Callback(EVIL)}
        given = {"batch_id": IDS.new(3)}
        return {
            "callbacks": self.queue.enqueue_call(RUN_BATCH, kwargs=given, result_ttl=600, **called),
            "a pickle as what rq keeps beside it": self.raw("meta", unpickles),
            "a pickle as its result": self.raw("result", unpickles),
        }

    def unreadable(self) -> None:
        """Records that rq makes nothing of."""
        for field in (
            "timeout",
            "status",
            "created_at",
            "dependency_ids",
            "retries_left",
            "failure_callback_name",
            "origin",
        ):
            self.raw(field, b"\xff")

    def failing(self) -> Job:
        """A job that fails, and names who is to be called then."""
        return self.queue.enqueue_call("os.getpid", on_failure=Callback(EVIL), failure_ttl=600)

    def abandoned(self) -> None:
        """A job that a worker left, and names who is to be called then: the worker itself looks at it."""
        job = self.raw("failure_callback_name", EVIL.encode())
        self.queue.remove(job)
        registry = StartedJobRegistry(queue=self.queue)
        self.connection.zadd(registry.key, {f"{job.id}:execution": 1})


async def test_jobs_that_are_not_ours_do_nothing_and_the_worker_lives_on(
    default_redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setenv("INJECTED", str(marker))
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        injector = Injector(default_redis_server.url, marker)
        injector.abandoned()
        injector.unreadable()
        refused, harmless, failing = injector.refused(), injector.harmless(), injector.failing()
        worker = it.worker()
        jobs = {**refused, **harmless, "with somebody to call": failing}

        async def all_have_ended() -> bool:
            return all(job.get_status() in (JobStatus.FAILED, JobStatus.FINISHED) for job in jobs.values())

        await it.served.system.until(all_have_ended, 90)
        assert {what for what, job in jobs.items() if job.get_status() == JobStatus.FINISHED} == set(harmless)
        reasons = {what: reason_of(injector, job) for what, job in refused.items()}
        named = {what for what, reason in reasons.items() if "is none of Baton's jobs: it was not run" in reason}
        assert set(refused) - named == {
            "ours with keywords that are none", "pickled by rq", "a pickle", "a packed pickle", "nothing",
        }, reasons  # fmt: skip
        assert all(reasons.values())
        made = await it.batch([text_line(str(number)) for number in range(5)])
        assert (await it.ended(made.id)).status == "completed"
        assert worker.poll() is None
    assert not marker.exists()


def reason_of(injector: Injector, job: Job) -> str:
    """Why it failed, as rq keeps it."""
    found = Job.fetch(job.id, connection=injector.connection, serializer=JSONSerializer)
    result = found.latest_result()
    return str(result.exc_string) if result is not None else ""


async def test_a_worker_that_rq_ends_says_that_nobody_asked_it_to(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        injector = Injector(default_redis_server.url, tmp_path)
        injector.connection.set(Job.key_for("odd"), "no hash")
        injector.queue.push_job_id("odd")
        worker = it.worker()
        await it.served.system.until(lambda: worker.poll() is not None, 30)
        assert worker.returncode == 1
        assert "nobody asked it to" in "".join(path.read_text() for path in tmp_path.glob("workers-batch*.log"))
        leaving = it.worker()
        made = await it.batch([text_line("a")])
        assert (await it.ended(made.id)).status == "completed"
        leaving.terminate()
        await it.served.system.until(lambda: leaving.poll() is not None, 30)
        assert leaving.returncode == 0


async def test_a_worker_that_was_killed_comes_again_under_its_name(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW, workers=0) as it:
        worker = it.worker("--name", "batch-0")
        made = await it.batch([text_line(str(number), max_tokens=20) for number in range(30)])

        async def has_begun() -> bool:
            return bool((await it.client.batches.retrieve(made.id)).request_counts.completed)

        await it.served.system.until(has_begun, 60)
        worker.kill()
        worker.wait()
        again = it.worker("--name", "batch-0")
        ended = await it.ended(made.id)
        assert (ended.status, ended.request_counts.completed) == ("completed", 30)
        assert again.poll() is None


async def test_rqs_own_tools_see_the_queue_the_worker_and_how_far_a_batch_is(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW) as it:
        made = await it.batch([text_line(str(number), max_tokens=20) for number in range(200)])
        connection = redis.Redis.from_url(default_redis_server.url)

        def progress() -> dict[str, Any]:
            job = BatchJob.fetch(made.id, connection=connection, serializer=JSONSerializer)
            return dict(job.get_meta())

        await it.served.system.until(lambda: progress().get("completed", 0) > 0, 60)
        assert progress()["batch_id"] == made.id and progress()["total"] == 200
        told = rq("info", "--url", default_redis_server.url, "--raw")
        assert f"queue {QUEUE} " in told
        assert "worker batch-" in told and " busy" in told
        await it.client.batches.cancel(made.id)
        assert (await it.ended(made.id)).status == "cancelled"
        assert "1 workers" in rq("info", "--url", default_redis_server.url)


@pytest.mark.faults
async def test_a_redis_of_rq_that_goes_away_and_comes_back_empty_ends_neither_a_batch_nor_its_worker(
    default_redis_server: RedisServer, tmp_path: Path, short_dir: Path
) -> None:
    server = RedisServer.start(short_dir, options=["--appendonly", "no"])
    try:
        server.wait_ready()
        async with batching(default_redis_server, tmp_path, f"rq.url={server.url}", *SLOW, workers=0) as it:
            worker = it.worker()
            made = await it.batch([text_line(str(number), max_tokens=20) for number in range(100)])

            async def some_are_done() -> bool:
                return (await it.client.batches.retrieve(made.id)).request_counts.completed > 0

            await it.served.system.until(some_are_done, 60)
            server.stop()
            batch = await it.ended(made.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 100)
            while_away = await it.batch([text_line("a")])
            assert while_away.status == "validating"
            server = RedisServer.start(short_dir, options=["--appendonly", "no"])
            server.wait_ready()
            assert (await it.ended(while_away.id)).status == "completed"
            assert worker.poll() is None
    finally:
        server.stop()


async def test_a_worker_does_not_wait_for_a_batch_that_somebody_has(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        held, free = [await it.batch([text_line("a")]) for _ in range(2)]
        command = it.served.system.connection.command
        await command("SET", batch_lease(held.id), "somebody")  # who renews it
        it.worker()
        assert (await it.ended(free.id)).status == "completed"
        assert (await it.client.batches.retrieve(held.id)).status == "validating"
        await command("DEL", batch_lease(held.id))
        assert (await it.ended(held.id)).status == "completed"


def rq(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("rq")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_batch_has_one_job_that_waits(default_redis_url: str) -> None:
    batches = BatchQueue(RedisSettings(url=default_redis_url), RqSettings())
    batches.check()
    ids = [IDS.new(float(second)) for second in (1, 2, 1)]
    for one in (ids[0], ids[1], ids[0], ids[0]):
        batches.enqueue(one)
    assert batches.queue.job_ids == ids[:2]
    job = batches.queue.fetch_job(ids[0])
    assert job is not None
    job.set_status(JobStatus.FAILED)
    batches.queue.remove(ids[0])
    batches.enqueue(ids[0])
    assert batches.queue.job_ids == [ids[1], ids[0]]
    batches.queue.remove(ids[1])  # a worker took it out and died before it said so
    batches.enqueue(ids[1])
    assert batches.queue.job_ids == [ids[0], ids[1]]
    batches.close()


@pytest.mark.parametrize("setting", ["rq.url", "redis.url"])
def test_a_cluster_is_refused_with_the_reason(default_redis_url: str, short_dir: Path, setting: str) -> None:
    options = ["--cluster-enabled", "yes", "--cluster-config-file", str(short_dir / "nodes.conf")]
    with RedisServer.start(short_dir, options=options) as cluster:
        cluster.wait_ready()
        urls = {"redis.url": default_redis_url, setting: cluster.url}
        sets = [part for name, url in urls.items() for part in ("--set", f"{name}={url}")]
        command = [sys.executable, "-m", "workers", "batch", *sets]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "Redis Cluster" in done.stderr and "hash tag" in done.stderr and "BATON_RQ_URL" in done.stderr
    assert "Traceback" not in done.stderr
