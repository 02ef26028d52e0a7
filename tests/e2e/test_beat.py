"""What a probe of a worker's container sees: files that are fresh, whatever Redis does, and one that is there only while it is at work."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.redis_server import RedisServer
from tests.system import System
from workers.beat import ALIVE, READY, Beat

pytestmark = pytest.mark.faults

QUICK = ("worker.lease_s=2", "redis.timeout_s=1", "redis.connect_s=60")


def seen(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


async def turns(system: System, folder: Path) -> None:
    """The file is touched once more than it was."""
    before = (folder / ALIVE).stat().st_mtime_ns
    await system.until(lambda: (folder / ALIVE).stat().st_mtime_ns > before, 60)


async def ended(worker: subprocess.Popen[bytes]) -> int:
    worker.send_signal(signal.SIGTERM)
    return await asyncio.to_thread(worker.wait, 30)


@pytest.mark.parametrize("stage", ["decode", "batch"])
async def test_it_is_ready_from_its_first_answer_of_redis_until_it_leaves(
    default_redis_url: str, tmp_path: Path, stage: str
) -> None:
    beats = tmp_path / "beats"
    async with System(default_redis_url, *QUICK, f"worker.beat_dir={beats}", log_dir=tmp_path) as system:
        worker = system.spawn("workers", stage)
        await system.until(lambda: seen(beats) == {ALIVE, READY})
        await turns(system, beats)
        assert (await ended(worker), seen(beats)) == (0, set())


@pytest.mark.parametrize("stage", ["prefill", "batch"])
async def test_without_redis_it_is_alive_and_not_ready(short_dir: Path, tmp_path: Path, stage: str) -> None:
    beats = tmp_path / "beats"
    with RedisServer.start(short_dir / "redis") as server:
        server.wait_ready()
        async with System(server.url, *QUICK, f"worker.beat_dir={beats}", log_dir=tmp_path) as system:
            worker = system.spawn("workers", stage)
            await system.until(lambda: READY in seen(beats))
            server.process.send_signal(signal.SIGSTOP)
            try:
                await system.until(lambda: seen(beats) == {ALIVE}, 60)
                await turns(system, beats)
            finally:
                server.process.send_signal(signal.SIGCONT)
            await system.until(lambda: READY in seen(beats), 30)
            assert await ended(worker) == 0


@pytest.mark.parametrize("stage", ["prefill", "batch"])
async def test_one_that_starts_waits_for_redis_and_lives_meanwhile(short_dir: Path, tmp_path: Path, stage: str) -> None:
    beats = tmp_path / "beats"
    async with System(
        f"unix://{short_dir}/redis/redis.sock", *QUICK, f"worker.beat_dir={beats}", log_dir=tmp_path
    ) as system:
        worker = system.spawn("workers", stage)
        await system.until(lambda: seen(beats) == {ALIVE})
        await turns(system, beats)
        with RedisServer.start(short_dir / "redis"):
            await system.until(lambda: READY in seen(beats), 60)
            assert await ended(worker) == 0


async def test_a_folder_that_cannot_be_had_is_told_at_the_start(default_redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    async with System(default_redis_url, f"worker.beat_dir={file}/beats", log_dir=tmp_path) as system:
        worker = system.spawn("workers", "decode")
        assert await asyncio.to_thread(worker.wait, 30) == 2
    (log,) = tmp_path.glob("workers-decode-*.log")
    assert f"worker.beat_dir = {file}/beats: Not a directory" in log.read_text()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beat = Beat("")
    beat.show(is_ready=True)
    beat.end()
    assert seen(tmp_path) == set()
