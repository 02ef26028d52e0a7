"""Questions to real workers: they answer whatever their engines do, pause and leave when told, and show their stacks."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.control import ControlClient
from pipeline.queue import Admission, Limits, PoolQueue
from tests.e2e.processes import children
from tests.system import POOL, System, collect, request

pytestmark = pytest.mark.faults

LIMITS = Limits(max_waiting_tasks=9, max_waiting_tokens=9000, deadline_s=60, result_ttl_s=60)
SLOW = "engine.mock.decode_base_ms=20"


async def asked(system: System, method: str, **options: Any) -> dict[str, Any]:
    """The answers of all workers that gave one."""
    replies = await ControlClient(system.connection, POOL).ask(method, timeout_s=20, **options)
    assert not replies.silent, replies
    return {name: answer.value for name, answer in replies.answers.items()}


async def stats_of(system: System, stage: str) -> dict[str, Any]:
    (name,) = await system.alive(stage)
    return dict((await asked(system, "stats", to=[name]))[name])


async def blocks_used(system: System, stage: str) -> int:
    return int((await stats_of(system, stage))["pool"]["blocks_used"])


async def state_is(system: System, request_id: str, stage: str, state: str) -> bool:
    got = await system.connection.command("HMGET", system.keys.request(request_id), "stage", "state")
    return bool(got == [stage.encode(), state.encode()])


async def test_a_worker_with_a_stopped_engine_still_answers(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, SLOW, log_dir=tmp_path) as system, system.client() as client:
        worker = await system.worker("decode")
        item = request(30, n=2, max_tokens=5000)
        stream = await client.submit(item)
        await system.until(lambda: system.logged(item.id, 5), 20)
        await system.until(lambda: blocks_used(system, "decode"), 20)
        [engine] = children(worker)
        os.kill(engine, signal.SIGSTOP)
        try:
            (name,) = await system.alive("decode")
            assert await asked(system, "ping") == {name: "pong"}
            (active,) = (await asked(system, "active"))[name]
            assert (active["id"], active["name"], active["epoch"], active["prompt_tokens"]) == (
                item.id,
                "decode",
                1,
                30,
            )
            assert min(active["tokens"]) >= 5
            assert active["seconds"] > 0
            stats = await stats_of(system, "decode")
            assert (stats["total"], stats["pid"], stats["prefetch_count"]) == ({"decode": 1}, worker.pid, 0)
            assert stats["pool"]["processes"] == [engine]
            assert stats["pool"]["blocks_used"] > 0
        finally:
            os.kill(engine, signal.SIGCONT)
        await stream.cancel("test")


async def test_only_those_that_are_named_answer_and_strangers_are_waited_for_in_vain(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        (decode,) = await system.alive("decode")
        client = ControlClient(system.connection, POOL)
        assert (await client.ask("ping", to=[decode], timeout_s=20)).answers.keys() == {decode}
        assert (await client.ask("ping", to=["nobody"], timeout_s=0.5)).answers == {}
        await system.connection.command("PUBLISH", system.keys.ask(), b"\x93nonsense")
        await system.connection.command("PUBLISH", system.keys.control(decode), b"\x92\xa6future\x01")
        unknown = await client.ask("dance", to=[decode], timeout_s=20)
        assert "knows no dance; it knows ping, " in unknown.answers[decode].error
        await PoolQueue(system.connection, POOL).renew(
            "prefill", "older", b"", 30
        )  # registered, but it knows no questions
        replies = await client.ask("ping", timeout_s=1)
        assert replies.silent == ["older"]
        assert len(replies.answers) == 2


async def test_a_paused_worker_claims_nothing_until_it_resumes(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("decode")
        (name,) = await system.alive("decode")
        assert list(await asked(system, "pause")) == [name]
        assert (await asked(system, "status"))[name]["state"] == "paused"
        assert (await stats_of(system, "decode"))["state"] == "paused"
        own = request(30)
        queue = PoolQueue(system.connection, POOL)
        await queue.admit(Admission(own, "decode", f"@{name}", ""), LIMITS)
        item = request(30)
        stream = await client.submit(item)
        await asyncio.sleep(1.0)  # two of its looks at the lanes: nothing is to happen
        assert await state_is(system, item.id, "decode", "queued")
        (reserved,) = (await asked(system, "reserved"))[name]
        assert (reserved["id"], reserved["lane"], reserved["prompt_tokens"]) == (own.id, f"@{name}", 30)
        await asked(system, "resume")
        assert (await collect(stream))[1].state == "done"
        assert (await asked(system, "status"))[name]["state"] == "working"


@pytest.mark.parametrize("order", ["drain", "shutdown"])
async def test_a_worker_that_is_told_to_leave_finishes_what_it_holds(
    default_redis_url: str, tmp_path: Path, order: str
) -> None:
    async with System(default_redis_url, SLOW, log_dir=tmp_path) as system, system.client() as client:
        worker = await system.worker("decode")
        item = request(30, max_tokens=60)
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: system.logged(item.id, 5), 20)
        (answer,) = (await asked(system, order)).values()
        assert answer == "drains 1 tasks, then leaves"
        assert (await reading)[1].state == "done"
        assert await asyncio.to_thread(worker.wait, 30) == 0
        assert await system.alive("decode") == []


@pytest.mark.parametrize(
    "numbers", [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]
)
async def test_a_cold_leave_hands_back_without_an_attempt_and_another_goes_on(
    default_redis_url: str, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    settings = (SLOW, "worker.max_attempts=1", "worker.lease_s=30")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        leaving = await system.worker("decode")
        expected, _ = await collect(await client.submit(request(30, max_tokens=60)))
        await system.worker("decode", "engine.mock.max_num_seqs=1")
        item = request(30, max_tokens=60)
        await asked(system, "pause", to=[name for name in await system.alive("decode") if str(leaving.pid) not in name])
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: system.logged(item.id, 5), 20)
        for number in numbers:
            leaving.send_signal(number)
            await asyncio.sleep(0.2)  # two that are pending at once would be one
        assert await asyncio.to_thread(leaving.wait, 30) == 0
        assert not reading.done()
        assert await system.connection.command("HGET", system.keys.request(item.id), "attempts") == b"0"
        await asked(system, "resume")
        tokens, ended = await reading
        assert (ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)


async def test_a_cold_leave_before_the_first_token_is_no_attempt(default_redis_url: str, tmp_path: Path) -> None:
    settings = ("worker.max_attempts=1", "worker.lease_s=30")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        leaving = await system.worker("decode", "engine.mock.prefill_base_ms=4000")
        item = request(30)
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: state_is(system, item.id, "decode", "running"), 20)
        leaving.send_signal(signal.SIGQUIT)
        await system.until(lambda: state_is(system, item.id, "decode", "queued"), 20)
        assert await asyncio.to_thread(leaving.wait, 30) == 0
        await system.worker("decode")
        assert (await reading)[1].state == "done"
        await system.until(system.rests, 10)


async def test_usr1_writes_the_stacks_of_worker_and_engine_and_both_go_on(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, SLOW, log_dir=tmp_path) as system, system.client() as client:
        worker = await system.worker("decode")
        (log,) = tmp_path.glob("workers-decode-*.log")
        item = request(30, max_tokens=60)
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: system.logged(item.id, 5), 20)
        [engine] = children(worker)
        worker.send_signal(signal.SIGUSR1)
        await system.until(lambda: log.read_text().count("most recent call first") >= 2, 20)
        text = log.read_text()
        assert "Stack for <Task" in text  # the loop's tasks
        assert "child.py" in text  # the engine's
        assert (await reading)[1].state == "done"
        assert children(worker) == [engine]


async def test_a_worker_that_is_stopped_while_its_engine_starts_leaves_nothing(
    default_redis_url: str, tmp_path: Path, short_dir: Path
) -> None:
    settings = (f"transfer.dir={short_dir}", f"pools.{POOL}.engine=torch", "engine.torch.threads=1")
    async with System(default_redis_url, log_dir=tmp_path) as system:
        sets = [part for setting in settings for part in ("--set", setting)]
        worker = system.spawn("workers", "prefill", *sets)
        await system.until(lambda: children(worker), 30)
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) == 0
        assert list(short_dir.iterdir()) == []
        assert await system.alive("prefill") == []
