"""A short, seeded run of `make scale-downs`, and who goes when somebody has to."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from pipeline.cli.supervisor import PoolSupervisor
from pipeline.control import ControlClient
from pipeline.scaling.places import Phase
from tests.autoscale.downs import SETTINGS, Levels, Report, run, settled, supervised
from tests.system import POOL, System, collect, request


@pytest.mark.faults
@pytest.mark.timeout(300)
async def test_scale_downs_under_load_lose_nothing_and_double_nothing(default_redis_url: str, tmp_path: Path) -> None:
    report = await run(default_redis_url, tmp_path, downs=8, seed=1, say=print)
    print(report)
    assert report.wrong == []
    assert report.downs >= 8
    assert report.gone > report.downs


async def test_the_worker_with_the_least_work_goes(default_redis_url: str, tmp_path: Path) -> None:
    report = Report()
    async with System(default_redis_url, *SETTINGS, "worker.drain_s=30", log_dir=tmp_path) as system:
        async with supervised(system, tmp_path, report) as (supervisor, levels), system.client() as client:
            # Given that the newer one of two works: of equals it would go
            await settled(system, supervisor, levels)
            await works_alone(system, "decode", "decode-1")
            stream = await client.submit(request(40, max_tokens=300))
            await system.until(lambda: system.logged(stream.id, 5))
            await order(system, "resume", "decode-0")

            # When one has to go
            await reach(system, supervisor, levels, prefill=1, decode=1)

            # Then it is the other one
            (left,) = await system.alive("decode")
            assert left.startswith("decode-1-")
            assert (await collect(stream))[1].state == "done"
    assert report.wrong == []


async def test_blocks_that_decode_still_needs_are_kept(default_redis_url: str, tmp_path: Path) -> None:
    report = Report()
    async with System(default_redis_url, *SETTINGS, "worker.drain_s=30", log_dir=tmp_path) as system:
        async with supervised(system, tmp_path, report) as (supervisor, levels), system.client() as client:
            # Given blocks that wait in the newer one of two prefill workers, for there is no decode worker
            await reach(system, supervisor, levels, prefill=2, decode=0)
            await works_alone(system, "prefill", "prefill-1")
            stream = await client.submit(request(200, max_tokens=30))
            await system.until(lambda: system.counter("handovers"))
            await order(system, "resume", "prefill-0")

            # When one has to go it is the other one; then this one, too, and it waits until decode has fetched them
            await reach(system, supervisor, levels, prefill=1, decode=0)
            (left,) = await system.alive("prefill")
            assert left.startswith("prefill-1-")
            await reach(system, supervisor, levels, prefill=0, decode=1)

            # Then nothing was computed again
            assert (await collect(stream))[1].state == "done"
            counters = await system.connection.command("HKEYS", system.keys.counters())
            assert [name for name in counters if name.startswith(b"kv_recomputed")] == []
    assert report.wrong == []


async def test_a_gpu_changes_its_stage_when_its_worker_has_gone(default_redis_url: str, tmp_path: Path) -> None:
    report = Report()
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system:
        async with supervised(system, tmp_path, report, gpus="7") as (supervisor, levels):
            # Given one GPU, and two stages that want it
            levels.wanted = {"prefill": 1, "decode": 1}
            await system.until(lambda: supervisor.phases() == {"prefill": [Phase.WORKING], "decode": []})
            assert own_workers() == [("prefill", "7")]

            # When it is to be decode's
            seen: list[set[str]] = []
            levels.wanted = {"prefill": 0, "decode": 1}

            def has_changed() -> bool:
                seen.append({stage for stage, _ in own_workers()})
                return supervisor.phases()["decode"] == [Phase.WORKING]

            await system.until(has_changed)

            # Then there never were two that had it
            assert {"prefill", "decode"} not in seen
            assert {"prefill"} in seen and {"decode"} in seen
            assert own_workers() == [("decode", "7")]
    assert report.wrong == []


def own_workers() -> list[tuple[str, str | None]]:
    """Workers that were started by this process: their stage, and the GPUs that they see."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or one that has ended, and was not asked for its code yet
            words, environment = process.cmdline(), process.environ()
            if "workers" in words:
                found.append((words[words.index("workers") + 1], environment.get("CUDA_VISIBLE_DEVICES")))
    return found


async def reach(system: System, supervisor: PoolSupervisor, levels: Levels, **wanted: int) -> None:
    levels.wanted = wanted
    await settled(system, supervisor, levels)


async def works_alone(system: System, stage: str, place: str) -> None:
    """The others of the stage claim nothing."""
    for name in await system.alive(stage):
        if not name.startswith(f"{place}-"):
            await order(system, "pause", name)


async def order(system: System, method: str, start: str) -> None:
    (name,) = [name for stage in ("prefill", "decode") for name in await system.alive(stage) if name.startswith(start)]
    replies = await ControlClient(system.connection, POOL).ask(method, to=[name])
    assert replies.answers[name].error == ""
