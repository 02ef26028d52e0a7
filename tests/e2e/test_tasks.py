"""Tasks of one's own, end to end: the example stage in worker processes, called through the Python client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipeline.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    RequestNotFound,
)
from pipeline.tasks import (
    FAILURE,
    PENDING,
    RETRY,
    REVOKED,
    STARTED,
    SUCCESS,
    AsyncResult,
    Generation,
    TaskClient,
    connect,
)
from tests.example_stage import count
from tests.system import System, request

QUEUE = "words"
LIMIT_S = 30  # generous: a loaded machine is slow, and nothing is asserted on time


class Words:
    """A system with workers of the example stage and a client of it."""

    def __init__(self, system: System, client: TaskClient, folder: Path) -> None:
        self.system, self.client, self.folder = system, client, folder

    async def worker(self, *overrides: str) -> subprocess.Popen[bytes]:
        return await self.system.worker(QUEUE, *overrides, app="tests.example_stage")

    async def call(self, task: str, *args: object, **options: object) -> AsyncResult:
        caller = self.client.task(task, queue=QUEUE)
        return await caller.apply_async(args, **options)  # type: ignore[arg-type]

    async def is_in(self, result: AsyncResult, *states: str) -> bool:
        return await result.state() in states

    async def reaches(self, result: AsyncResult, *states: str) -> None:
        await self.system.until(lambda: self.is_in(result, *states), LIMIT_S)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def log(self) -> str:
        """What the workers wrote."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("workers-words-*.log")))

    async def wrote(self, line: str) -> None:
        """Waits for a line of a worker."""
        await self.system.until(lambda: line in self.log, LIMIT_S)

    async def noted(self, path: str, lines: int) -> list[str]:
        await self.system.until(lambda: count(path) >= lines, LIMIT_S)
        return Path(path).read_text().splitlines()


@contextlib.asynccontextmanager
async def open_words(url: str, folder: Path, *overrides: str) -> AsyncIterator[Words]:
    fast = ("worker.retry_backoff_s=0.1", "worker.drain_s=1", "worker.sweep_s=0.1", *overrides)
    async with System(url, *fast, log_dir=folder) as system, connect(system.settings) as client:
        yield Words(system, client, folder)


@pytest.fixture
async def words(default_redis_url: str, tmp_path: Path) -> AsyncIterator[Words]:
    async with open_words(default_redis_url, tmp_path) as opened:
        yield opened


async def test_a_task_gives_its_result(words: Words) -> None:
    await words.worker()
    embed = words.client.task("embed", queue=QUEUE)
    result = await embed.delay("a boat", scale=2.0)
    assert await result.get(timeout=LIMIT_S) == [4.0, 0.0, 0.0, 2.0, 0.0]
    assert (await result.state(), await result.ready()) == (SUCCESS, True)
    again = words.client.result(result.id)  # any process that knows the id
    assert await again.get(timeout=LIMIT_S) == [4.0, 0.0, 0.0, 2.0, 0.0]
    assert await (await words.call("rank", ["ccc", "a", "bb"])).get(timeout=LIMIT_S) == ["a", "bb", "ccc"]
    await words.system.until(words.system.rests, LIMIT_S)


async def test_many_are_waited_for_at_once_without_streams(words: Words) -> None:
    await words.worker()
    results = [await words.call("embed", "a" * length) for length in range(200)]
    given = await asyncio.gather(*(result.get(timeout=60) for result in results))
    assert [vector[0] for vector in given] == list(range(200))
    assert len(words.client.pool.ends) == 0


async def test_an_end_that_the_bus_did_not_bring_is_found(words: Words) -> None:
    """As from another process, or after a lost connection: nothing of the request is ever sent to this client."""
    result = await words.call("embed", "a")
    await words.system.connection.command("HDEL", words.system.keys.request(result.id), "notify")
    waiting = asyncio.create_task(result.get(timeout=LIMIT_S))
    await words.worker()
    assert await waiting == [1.0, 0.0, 0.0, 0.0, 0.0]


async def test_an_unknown_id_is_never_pending(words: Words) -> None:
    unknown = words.client.result("baton-tiny-nobody")
    for ask in (unknown.state, unknown.get, unknown.revoke, unknown.ready):
        with pytest.raises(RequestNotFound, match="baton-tiny-nobody"):
            await ask()


async def test_an_unknown_task_is_dead_lettered_and_says_what_there_is(words: Words) -> None:
    await words.worker()
    result = await words.call("no_such")
    with pytest.raises(RequestFailed, match=r"unknown task 'no_such': worker .* knows broken, embed, "):
        await result.get(timeout=LIMIT_S)
    assert await result.state() == FAILURE
    assert await words.system.connection.command("XLEN", words.system.keys.dead()) == 1


async def test_wrong_arguments_are_not_tried_again(words: Words) -> None:
    await words.worker()
    with pytest.raises(RequestFailed, match="embed: missing a required argument: 'text' after 1 attempts"):
        await (await words.call("embed")).get(timeout=LIMIT_S)
    with pytest.raises(InvalidRequest, match="arguments of embed cannot be sent"):
        await words.call("embed", object())
    with pytest.raises(InvalidRequest, match="'decode' cannot be a queue of one's own"):
        words.client.task("embed", queue="decode")


async def test_a_revoked_task_is_stopped_wherever_it_is(words: Words) -> None:
    waiting = await words.call("embed", "a")
    assert await waiting.state() == PENDING
    await waiting.revoke()
    await words.worker()
    path = words.path("ran")
    running = await words.call("wait_for", path, words.path("never"))
    await words.noted(path, 1)
    await words.reaches(running, STARTED)
    await running.revoke("changed my mind")
    assert (await words.noted(path, 2))[1] == "cancelled"
    for result in (waiting, running):
        assert await result.state() == REVOKED
    with pytest.raises(RequestCancelled, match=f"{running.id}: changed my mind"):
        await running.get(timeout=LIMIT_S)
    assert await (await words.call("embed", "a")).get(timeout=LIMIT_S)
    await words.wrote(f"Task wait_for[{running.id}] cancelled: changed my mind")
    plain = await words.call("wait_for", path, words.path("never"))
    await words.reaches(plain, STARTED)
    await plain.revoke()
    await words.wrote(f"Task wait_for[{plain.id}] revoked")


@pytest.mark.parametrize("task", ["wait_for", "wait_within"])
async def test_the_stacks_of_a_worker_lead_to_the_line_where_a_task_waits(words: Words, task: str) -> None:
    worker = await words.worker()
    path = words.path("ran")
    result = await words.call(task, path, words.path("never"))
    await words.noted(path, 1)
    worker.send_signal(signal.SIGUSR1)
    await words.wrote("await asyncio.sleep(0.02)")
    (stack,) = [part for part in words.log.split("Stack for ") if "await asyncio.sleep(0.02)" in part]
    assert re.search(r'File ".*/tests/example_stage\.py", line \d+, in wait_for\n', stack)
    await result.revoke()


async def test_a_retry_waits_for_its_countdown(words: Words) -> None:
    await words.worker()
    path = words.path("flaky")
    result = await words.call("flaky", path, 3)
    assert (
        await result.get(timeout=LIMIT_S) == 3
    )  # attempts, more than worker.max_attempts allows: the task has its own
    times = [float(line) for line in await words.noted(path, 4)]
    assert all(after - before >= 0.45 for before, after in itertools.pairwise(times))
    slow = await words.call("later", words.path("later"))
    await words.reaches(slow, RETRY)
    await slow.revoke()
    assert await slow.state() == REVOKED


async def test_what_a_task_raises_is_tried_again_and_then_given_up(words: Words) -> None:
    await words.worker()
    path = words.path("broken")
    with pytest.raises(RequestFailed, match="KeyError: 'no such word' after 2 attempts in words"):
        await (await words.call("broken", path)).get(timeout=LIMIT_S)
    assert count(path) == 2
    with pytest.raises(RequestFailed, match="will not do this"):
        await (await words.call("refuse")).get(timeout=LIMIT_S)


async def test_a_worker_names_the_task_and_says_that_its_last_attempt_was_the_last(words: Words) -> None:
    await words.worker()
    result = await words.call("broken", words.path("broken"))
    with pytest.raises(RequestFailed):
        await result.get(timeout=LIMIT_S)
    why = "KeyError: 'no such word'"
    await words.wrote(f"Task broken[{result.id}] dead-lettered after 2 attempts: {why}; `baton dead show {result.id}`")
    assert words.log.count(f"Task broken[{result.id}] received") == 2
    assert words.log.count(f"Task broken[{result.id}] raised unexpected: KeyError('no such word')") == 2
    assert words.log.count(f"Task broken[{result.id}] retry: {why}") == 1
    strange = await words.call("no_such")
    await words.wrote(f"Task no_such[{strange.id}] rejected after 1 attempt: unknown task 'no_such'")


async def test_a_result_that_cannot_be_stored_fails_clearly(default_redis_url: str, tmp_path: Path) -> None:
    async with open_words(default_redis_url, tmp_path, "queue.max_result_bytes=1000") as words:
        await words.worker()
        assert await (await words.call("give", 900)).get(timeout=LIMIT_S) == bytes(900)
        with pytest.raises(RequestFailed, match=r"1003 bytes, more than queue.max_result_bytes \(1000\)"):
            await (await words.call("give", 1000)).get(timeout=LIMIT_S)
        with pytest.raises(RequestFailed, match="cannot be stored: Encoding objects of type object"):
            await (await words.call("strange")).get(timeout=LIMIT_S)


async def test_a_soft_limit_is_raised_inside(words: Words) -> None:
    await words.worker()
    caught = await words.call("softly", True)
    assert await caught.get(timeout=LIMIT_S) == "soft time limit of 0.3 s passed in softly"
    with pytest.raises(RequestFailed, match=r"soft time limit of 0.3 s passed in softly"):
        await (await words.call("softly", False)).get(timeout=LIMIT_S)


async def test_a_hard_limit_stops_the_task(words: Words) -> None:
    worker = await words.worker()
    path = words.path("hard")
    with pytest.raises(RequestFailed, match=r": time limit of 0.3 s passed in hard$"):
        await (await words.call("hard", path)).get(timeout=LIMIT_S)
    assert await words.noted(path, 1) == ["cleaned up"]
    assert await (await words.call("embed", "a")).get(timeout=LIMIT_S)
    assert worker.poll() is None


@pytest.mark.parametrize("task", ["stubborn", "stubborn_thread"])
async def test_a_task_that_cannot_be_stopped_ends_its_worker_and_nothing_else(words: Words, task: str) -> None:
    worker = await words.worker()
    go, path = words.path("go"), words.path("other")
    other = await words.call("wait_for", path, go)
    await words.noted(path, 1)
    with pytest.raises(RequestFailed, match=f"time limit of 0.3 s passed in {task}$"):
        await (await words.call(task, words.path("stuck"))).get(timeout=LIMIT_S)
    assert await asyncio.to_thread(worker.wait, LIMIT_S) == 70
    assert await other.state() == PENDING  # handed back, no attempt counted
    (log,) = words.folder.glob("workers-words-*.log")
    assert log.read_text().count("handler does not end when it is stopped") == 1
    Path(go).touch()
    await words.worker()
    assert await other.get(timeout=LIMIT_S) != worker.pid
    await words.system.until(words.system.rests, LIMIT_S)


async def test_countdown_and_expires(words: Words) -> None:
    path = words.path("order")
    expired = await words.call("order", path, "never", expires=0.5)  # nobody is there to take it
    with pytest.raises(DeadlineExceeded, match=f"{expired.id}: deadline passed while waiting for words"):
        await expired.get(timeout=LIMIT_S)
    with pytest.raises(InvalidRequest, match="before its countdown"):
        await words.call("order", path, "never", countdown=30, expires=0.5)
    await words.worker()
    late = await words.call("order", path, "late", countdown=3, expires=3.5 + LIMIT_S)
    with pytest.raises(TimeoutError, match=f"{late.id} has not ended within 0.1 s"):
        await late.get(timeout=0.1)
    await late.get(timeout=LIMIT_S)
    assert count(path) == 1
    assert await expired.state() == FAILURE
    running = await words.call("wait_for", words.path("w"), words.path("never"), expires=1.5)
    with pytest.raises(DeadlineExceeded, match="deadline passed in words"):
        await running.get(timeout=LIMIT_S)
    await words.wrote(f"Task wait_for[{running.id}] expired: deadline passed in words")


async def test_an_idempotency_key_runs_once(words: Words) -> None:
    path = words.path("order")
    first = await words.call("order", path, "once", idempotency_key="batch:7:1")
    second = await words.call("order", path, "once", idempotency_key="batch:7:1")
    assert first.id == second.id
    await words.worker()
    await second.get(timeout=LIMIT_S)
    assert (await words.call("order", path, "once", idempotency_key="batch:7:1")).id == first.id
    assert count(path) == 1


async def test_higher_priorities_go_first(words: Words) -> None:
    path = words.path("order")
    results = [await words.call("order", path, lane, priority=lane) for lane in ("low", "default", "high")]
    await words.worker("worker.concurrency=1")
    for result in results:
        await result.get(timeout=LIMIT_S)
    assert await words.noted(path, 3) == ["high", "default", "low"]
    with pytest.raises(InvalidRequest, match="priority 'urgent' is none of high, default, low"):
        await words.call("order", path, "x", priority="urgent")


async def test_another_worker_finishes_what_a_killed_one_held(default_redis_url: str, tmp_path: Path) -> None:
    async with open_words(default_redis_url, tmp_path, "worker.lease_s=2") as words:
        first = await words.worker()
        path, go = words.path("ran"), words.path("go")
        result = await words.call("wait_for", path, go)
        await words.noted(path, 1)
        second = await words.worker()
        first.kill()
        assert await words.noted(path, 2) == [str(first.pid), str(second.pid)]
        Path(go).touch()
        assert await result.get(timeout=LIMIT_S) == second.pid


async def test_a_stream_goes_on_where_a_killed_worker_left_it(default_redis_url: str, tmp_path: Path) -> None:
    async with open_words(default_redis_url, tmp_path, "worker.lease_s=2") as words:
        first = await words.worker()
        text, path = "the quick brown fox jumps over the lazy dog", words.path("began")
        result = await words.call("slow_spell", text, path)
        read: list[int] = []
        async with asyncio.timeout(60):
            async for token_ids in result:
                read += token_ids
                if len(read) >= 5 and first.poll() is None:
                    first.kill()
                    await words.worker()
        assert "".join(map(chr, read)) == text
        assert await result.get(timeout=LIMIT_S) == len(text)
        began = [line.split() for line in await words.noted(path, 2)]
        assert began[0] == [str(first.pid), "0"]
        assert int(began[1][1]) >= 5
        assert [chunk async for chunk in words.client.result(result.id)] == [read]  # later on, from the log


async def test_a_worker_that_is_asked_to_leave_hands_back_what_it_holds(words: Words) -> None:
    worker = await words.worker()
    path, go = words.path("ran"), words.path("go")
    result = await words.call("wait_for", path, go)
    await words.noted(path, 1)
    worker.send_signal(signal.SIGTERM)  # drains for a second
    assert await asyncio.to_thread(worker.wait, LIMIT_S) == 0
    assert (await words.noted(path, 2))[1] == "cancelled"
    assert await result.state() == PENDING
    *_, handed_back, left = words.log.splitlines()
    assert "handing back what is not finished" in handed_back
    assert result.id in handed_back
    assert "another worker takes it up; no attempt is counted" in handed_back
    assert " left." in left
    Path(go).touch()
    await words.worker()
    assert await result.get(timeout=LIMIT_S)


async def test_generations_are_submitted_the_same_way(words: Words) -> None:
    await words.system.worker("prefill")
    await words.system.worker("decode")
    item = request(20, max_tokens=12)
    streamed = await words.client.generate(item)
    assert streamed.id == item.id
    tokens: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        async for token_ids in streamed:
            tokens += token_ids
    results = [
        await words.client.generate(item.input, priority="low", idempotency_key=f"batch:1:{line % 20}")
        for line in range(40)
    ]
    assert len({result.id for result in results}) == 20
    given = await asyncio.gather(*(result.get(timeout=60) for result in results))
    assert all(isinstance(one, Generation) and one.token_ids == [tokens] for one in given)
    assert given[0].usage.completion_tokens == 12
    with pytest.raises(InvalidRequest, match="needs a limit"):
        await words.client.generate(request(3, max_tokens=None).input)  # type: ignore[arg-type]
    await words.system.until(words.system.rests, LIMIT_S)


async def test_time_passes_for_a_worker_that_only_waits(words: Words) -> None:
    """Its leases are renewed all the while: nobody else takes the task."""
    async with open_words(words.system.settings.redis.url, words.folder, "worker.lease_s=1") as quick:
        await quick.worker()
        await quick.worker()
        path, go = quick.path("ran"), quick.path("go")
        result = await quick.call("wait_for", path, go)
        await quick.noted(path, 1)
        until_s = time.monotonic() + 3.5

        def has_waited() -> bool:
            return time.monotonic() > until_s

        await quick.system.until(has_waited, LIMIT_S)
        Path(go).touch()
        await result.get(timeout=LIMIT_S)
        assert count(path) == 1
