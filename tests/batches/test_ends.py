"""Batches that do not simply complete: their time is over, their worker leaves, stands still or dies, their bytes are lost."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.keys import batch_lease, batch_parts, batch_record
from pipeline.redis_server import RedisServer
from tests.batches.running import Batching, batching, text_line

SLOW = ("engine.mock.decode_base_ms=20", "batches.max_in_flight=4", "batches.part_lines=5")
LINES = 120


async def begun(it: Batching, lines: int = LINES, **more: Any) -> Any:
    """A batch that runs, some of whose lines are in parts."""
    made = await it.batch([text_line(str(number), max_tokens=10) for number in range(lines)], **more)
    await it.served.system.until(lambda: _has_parts(it, made.id), 60)
    return made


async def _has_parts(it: Batching, batch_id: str) -> bool:
    return bool(await it.served.system.connection.command("LLEN", batch_parts(batch_id)))


async def check_each_line_once(it: Batching, batch: Any, lines: int = LINES) -> None:
    done, missing = await it.lines(batch.output_file_id), await it.lines(batch.error_file_id)
    assert sorted(int(line["custom_id"]) for line in [*done, *missing]) == list(range(lines))
    assert (batch.request_counts.total, batch.request_counts.completed) == (lines, len(done))
    assert batch.usage.output_tokens == 10 * len(done)
    await it.served.system.until(it.served.rests, 20)
    await it.served.system.until(lambda: not scratch_of(it, batch), 20)


def scratch_of(it: Batching, batch: Any) -> list[Path]:
    """Its parts in the store."""
    return [path for path in (it.served.log_dir / "files").rglob("*") if path.name.startswith(batch.id)]


async def test_when_its_window_is_over_a_batch_keeps_what_was_answered(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW) as it:
        made = await begun(
            it, 400, completion_window="6s", output_expires_after={"anchor": "created_at", "seconds": 3600}
        )
        batch = await it.ended(made.id)
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at
        missing = await it.lines(batch.error_file_id)
        assert missing and {line["error"]["code"] for line in missing} == {"batch_expired"}
        assert batch.request_counts.failed == 0
        await check_each_line_once(it, batch, 400)
        file = await it.client.files.retrieve(batch.output_file_id)
        assert (file.purpose, file.expires_at) == ("batch_output", file.created_at + 3600)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_leaves_dies_or_stands_still_is_followed_by_another_one(
    default_redis_server: RedisServer, tmp_path: Path, how: signal.Signals
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW) as it:
        made = await begun(it)
        (first,) = [one for one in it.served.system.processes if "batch" in one.args]  # type: ignore[operator]
        holder = await it.served.system.connection.command("GET", batch_lease(made.id))
        processes = [first.pid, *horses_of(first)] if how == signal.SIGSTOP else [first.pid]
        for pid in processes:
            os.kill(pid, how)
        it.worker()

        async def another_has_it() -> bool:
            now = await it.served.system.connection.command("GET", batch_lease(made.id))
            return now not in (None, holder)

        await it.served.system.until(another_has_it, 60)
        if how == signal.SIGSTOP:
            for pid in processes:  # it goes on as if nothing had been
                os.kill(pid, signal.SIGCONT)
        batch = await it.ended(made.id)
        assert batch.status == "completed"
        await check_each_line_once(it, batch)
        if how == signal.SIGTERM:
            await it.served.system.until(lambda: first.poll() is not None, 20)
            assert first.returncode == 0


def horses_of(worker: subprocess.Popen[bytes]) -> list[int]:
    """Processes that it forked."""
    return [int(pid) for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()]


async def test_an_input_whose_bytes_are_lost_fails_its_batch(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        made = await it.batch([text_line("a")])
        (bytes_of_it,) = (path for path in (tmp_path / "files").rglob("*") if path.is_file())
        bytes_of_it.unlink()
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["file_lost"])


async def test_a_part_that_is_lost_fails_its_batch(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW) as it:
        made = await begun(it)
        scratch_of(it, made)[0].unlink()
        batch = await it.ended(made.id)
        assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["file_lost"])
        assert batch.output_file_id is batch.error_file_id is None
        await it.served.system.until(it.served.rests, 20)
        await it.served.system.until(lambda: not scratch_of(it, batch), 20)


async def test_a_batch_whose_model_is_no_more_ends_all_the_same(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    """Its pool was taken out of the settings of who goes on with it: each line is told so."""
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        first = it.served.system.spawn("workers", "batch", "--set", "pools.gone.engine=mock")
        made = await it.batch([text_line(str(number), model="gone") for number in range(3)])

        async def runs() -> bool:
            return (await it.client.batches.retrieve(made.id)).status == "in_progress"

        await it.served.system.until(runs, 60)
        first.kill()
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, batch.request_counts.failed) == ("completed", 3)
        errors = await it.lines(batch.error_file_id)
        assert [line["response"]["body"]["error"]["code"] for line in errors] == ["model_not_found"] * 3


LONG = ("engine.mock.decode_base_ms=50", "batches.max_in_flight=4")  # a line of 2,000 tokens takes 100 s


async def whose_worker_died(it: Batching) -> Any:
    """A batch whose lines take longer than any test, some of which run; the worker that sent them is gone."""
    made = await it.batch([b"\n", *(text_line(str(number), max_tokens=2000) for number in range(6))])
    await it.served.system.until(lambda: it.served.running(4), 60)
    (worker,) = [one for one in it.served.system.processes if "batch" in one.args]  # type: ignore[operator]
    worker.kill()
    return made


async def test_a_cancel_ends_what_a_dead_worker_had_sent(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with batching(default_redis_server, tmp_path, *LONG) as it:
        made = await whose_worker_died(it)
        await it.client.batches.cancel(made.id)
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, batch.request_counts.total) == ("cancelled", 6)
        assert await it.served.ended("cancelled") == 4
        assert len(await it.lines(batch.error_file_id)) == 6
        await it.served.system.until(it.served.rests, 20)


async def test_an_input_that_is_deleted_while_its_batch_runs_ends_what_runs(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *LONG) as it:
        made = await whose_worker_died(it)
        await it.client.files.delete(made.input_file_id)
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["file_not_found"])
        assert await it.served.ended("cancelled") == 4
        await it.served.system.until(it.served.rests, 20)


async def test_a_batch_that_was_cancelled_before_it_was_read_has_no_files(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    """Nobody knows what is in its input."""
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        made = await it.batch([text_line("a"), text_line("a"), b"no JSON\n"])
        await it.served.system.connection.command("HSET", batch_record(made.id), "state", "cancelling")
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("cancelled", None, None)
        assert batch.request_counts.total == 0


async def test_a_batch_that_fails_at_its_very_end_has_no_files(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    """Its worker died when the first file was made; then a part was lost."""
    async with batching(default_redis_server, tmp_path, workers=0) as it:
        made, output = await it.batch([text_line("a")]), await it.upload([b"an answer\n"])
        command = it.served.system.connection.command
        fields = ("state", "finalizing", "total", 1, "in_progress_s", 1, "output_file_id", output)
        await command("HSET", batch_record(made.id), *fields)
        await command("RPUSH", batch_parts(made.id), "5 nowhere/part")
        it.worker()
        batch = await it.ended(made.id)
        assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["file_lost"])
        assert batch.output_file_id is None
        assert [file.id async for file in it.client.files.list()] == [made.input_file_id]


async def test_a_limit_that_is_lowered_while_a_batch_runs_loses_no_line(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW, workers=0) as it:
        first = it.worker()
        made = await begun(it)
        first.kill()
        it.served.system.spawn("workers", "batch", "--set", "batches.max_line_bytes=50")
        batch = await it.ended(made.id)
        assert batch.status == "completed"
        await check_each_line_once(it, batch)
