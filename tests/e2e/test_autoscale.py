"""`baton autoscale` with real processes: workers come with demand and go without it, and nothing is lost by either.

The settings make everything quick: a look each 0.2 s, calm after a second or two. What a worker takes to start is what it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from pipeline.events import listen
from pipeline.keys import PoolKeys
from pipeline.queue import STAGES
from tests.e2e.test_up import LIMIT_S, Up, command, left_over, up
from tests.system import POOL, System, collect, request

QUICK = (
    "autoscale.poll_s=0.2", "autoscale.up_after=1", "autoscale.down_after_s=1", "autoscale.cooldown_s=1",
    "autoscale.idle_s=1.5", "autoscale.start_s=2", "worker.lease_s=1", "log.level=info",
)  # fmt: skip


TWO_POOLS = ("pools.other.engine=mock", "pools.other.model=baton-tiny", "pools.other.tokenizer=none")


@contextlib.asynccontextmanager
async def running(redis_url: str, folder: Path, *settings: str) -> AsyncIterator[System]:
    async with System(redis_url, *QUICK, *settings, log_dir=folder) as system:
        yield system


@contextlib.asynccontextmanager
async def autoscale(system: System, *words: str) -> AsyncIterator[Up]:
    """A `baton autoscale` of the pool; it is killed at the end if it has not left by then, and its workers with it."""
    sets = [word for override in system.overrides for word in ("--set", override)]
    async with command("autoscale", *words, *sets) as one:
        yield one


async def leaves(one: Up) -> int:
    """Its exit code after SIGTERM."""
    one.process.send_signal(signal.SIGTERM)
    return await one.ended()


async def workers(system: System) -> int:
    return sum([len(await system.alive(stage)) for stage in STAGES])


async def test_from_zero_a_request_is_answered_when_workers_have_started_and_later_there_are_none(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with running(default_redis_url, tmp_path) as system, autoscale(system) as one, system.client() as client:
        await one.says("scales baton-tiny")
        events = await listen(system.connection, [POOL])
        assert await workers(system) == 0

        # When a request comes
        began_s = time.monotonic()
        tokens, ended = await collect(await client.submit(request(40)))
        took_s = time.monotonic() - began_s

        # Then it waits for its workers, and for little else
        assert (ended.state, len(tokens[0])) == ("done", 16)
        started = [float(said) for said in re.findall(r"serves after ([\d.]+) s", one.output)]
        print(f"answered after {took_s:.2f} s, workers started in {started}")
        assert took_s < max(started) + 2

        # And each decision is told with its reason
        async with asyncio.timeout(5):
            _, event = await anext(told async for told in events if told[1].type == "stage-scaled")
        assert re.match(r"0 -> 1: .+", event.detail)
        assert re.search(r"prefill 0 -> 1: \w.+", one.output)

        # And when nothing comes any more the workers go, and nothing is left
        await one.says("prefill-0 has gone")
        await one.says("decode-0 has gone")
        assert await workers(system) == 0
        numbers = await system.connection.command("HMGET", system.keys.scaling(), "desired:decode", "ups:decode")
        assert numbers == [b"0", b"1"]
        assert await system.at_rest() == {}
        assert await leaves(one) == 0
        assert await system.connection.command("EXISTS", system.keys.scaler(), system.keys.crew()) == 0


async def test_workers_of_others_count_and_stay(default_redis_url: str, tmp_path: Path) -> None:
    async with running(default_redis_url, tmp_path) as system:
        mine = await system.worker("decode")
        async with autoscale(system, "--explain") as one, system.client() as client:
            await one.says("scales baton-tiny")
            assert (await collect(await client.submit(request(40))))[1].state == "done"
            await one.says("decode 1 -> 0")
            await one.says("decode stays at 0")
            assert await leaves(one) == 0
        assert mine.poll() is None
        assert "decode-0 serves" not in one.output
        assert len(await system.alive("decode")) == 1


async def test_a_second_one_says_who_has_the_pool(default_redis_url: str, tmp_path: Path) -> None:
    async with running(default_redis_url, tmp_path) as system, autoscale(system) as first:
        await first.says("scales baton-tiny")
        async with autoscale(system) as second:
            assert await second.ended() == 3
        assert f"pool baton-tiny is scaled by process {first.process.pid} on " in second.output
        assert await leaves(first) == 0


@pytest.mark.faults
async def test_kill_leaves_no_orphan_and_the_next_one_goes_on(default_redis_url: str, tmp_path: Path) -> None:
    settings = ("worker.lease_s=60", "engine.mock.decode_base_ms=20", "autoscale.idle_s=60")
    async with running(default_redis_url, tmp_path, *settings) as system, system.client() as client:
        async with autoscale(system) as first:
            await first.says("scales baton-tiny")
            undisturbed, _ = await collect(await client.submit(request(40, max_tokens=150)))

            # Given one that is killed while its workers compute
            stream = await client.submit(request(40, max_tokens=150))
            asking = asyncio.create_task(collect(stream))
            await system.until(lambda: system.logged(stream.id, 20))
            family = first.family
            first.process.kill()
            await first.ended()

        # Then its workers end
        assert left_over(family) == []

        # And the next one has the pool at once, and what they held goes on long before its lease runs out
        async with autoscale(system) as second:
            await second.says("held 1 task: waiting for another worker")
            tokens, ended = await asking
            assert (ended.state, tokens) == ("done", undisturbed)
            assert await system.at_rest() == {}
            assert await leaves(second) == 0


async def test_a_worker_that_dies_is_started_again_and_one_that_cannot_start_waits_longer_each_time(
    default_redis_url: str, tmp_path: Path
) -> None:
    broken = ("transfer.kind=shm", f"transfer.dir={tmp_path}/none", "autoscale.prefill.min_workers=1")
    async with running(default_redis_url, tmp_path, *broken) as system:
        async with autoscale(system) as one:
            await one.says(r"prefill-0 ended with code \d: its place is empty for 0\.5 s")
            await one.says(r"prefill-0 ended with code \d: its place is empty for 1 s")
            assert await leaves(one) == 0
    async with running(default_redis_url, tmp_path, "autoscale.decode.min_workers=1") as system:
        async with autoscale(system) as one:
            await one.says("decode-0 serves")
            one.child("-m workers decode").kill()
            await one.says("decode-0 was ended by SIGKILL: its place is empty for 0.5 s")
            await one.says(r"empty for[\s\S]*decode-0 serves")
            assert await leaves(one) == 0


@pytest.mark.faults
async def test_a_worker_that_hangs_is_killed_and_started_again(default_redis_url: str, tmp_path: Path) -> None:
    async with running(default_redis_url, tmp_path, "autoscale.decode.min_workers=1") as system:
        async with autoscale(system) as one:
            await one.says("decode-0 serves")
            one.child("-m workers decode").send_signal(signal.SIGSTOP)
            await one.says(r"decode-0 was not heard of for \d s: killed")
            await one.says(r"was ended by SIGKILL[\s\S]*decode-0 serves")
            assert await leaves(one) == 0


@pytest.mark.faults
async def test_a_worker_that_never_serves_is_killed_and_started_again(default_redis_url: str, tmp_path: Path) -> None:
    settings = ("autoscale.decode.min_workers=1", "autoscale.start_limit_s=0.05")  # no worker starts in so little
    async with running(default_redis_url, tmp_path, *settings) as system, autoscale(system) as one:
        await one.says(r"decode-0 does not serve after \d s: killed[\s\S]*killed")
        assert await leaves(one) == 0


async def test_a_gpu_that_another_supervisor_has_is_waited_for(
    default_redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it is locked
    device = f"none-{secrets.token_hex(4)}"
    bounds = ("autoscale.decode.min_workers=1", "autoscale.prefill.max_workers=0", f"autoscale.devices={device}")
    async with running(default_redis_url, tmp_path, *TWO_POOLS, *bounds) as system:
        async with autoscale(system, "--pool", POOL) as first:
            await first.says("decode-0 serves")
            (child,) = [one for one in first.family if "decode" in " ".join(one.cmdline())]
            assert child.environ()["CUDA_VISIBLE_DEVICES"] == device
            async with autoscale(system, "--pool", "other") as second:
                await second.says("other: others have all GPUs, it waits for one")
                assert await leaves(first) == 0
                await second.says("other.decode-0 serves")
                assert await leaves(second) == 0


async def test_of_two_pools_the_free_one_is_left_where_the_other_is_taken(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with running(default_redis_url, tmp_path, *TWO_POOLS) as system:
        async with autoscale(system, "--pool", POOL) as first:
            await first.says("scales baton-tiny;")
            async with autoscale(system, "--pool", "other", "--pool", "other", "--pool", POOL) as second:
                assert await second.ended() == 3
            assert f"pool {POOL} is scaled by process {first.process.pid}" in second.output
            assert await system.connection.command("EXISTS", PoolKeys("other").scaler()) == 0
            assert await leaves(first) == 0


@pytest.mark.faults
async def test_a_pool_that_is_lost_lets_its_workers_go_in_order_whatever_signal_comes(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with running(default_redis_url, tmp_path, "engine.mock.decode_base_ms=50") as system:
        async with autoscale(system) as one, system.client() as client:
            await one.says("scales baton-tiny")
            stream = await client.submit(request(40, max_tokens=100))
            await system.until(lambda: system.logged(stream.id, 5))
            far = '{"machine":"elsewhere","pid":1,"began":"7","host":"far"}'
            await system.connection.command("SET", system.keys.scaler(), far)
            await one.says("pool baton-tiny is scaled by process 1 on far")
            await one.says("workers finish what they hold")
            one.process.send_signal(signal.SIGTERM)  # of who stops it: it stops already
            assert (await collect(stream))[1].state == "done"
            assert await one.ended() == 3
            assert "killing" not in one.output and "never retrieved" not in one.output
        assert await system.connection.command("GET", system.keys.scaler()) == far.encode()
        await system.connection.command("DEL", system.keys.scaler())


@pytest.mark.faults
async def test_the_pool_is_kept_while_workers_leave(default_redis_url: str, tmp_path: Path) -> None:
    async with running(default_redis_url, tmp_path, "engine.mock.decode_base_ms=50") as system:
        async with autoscale(system) as one, system.client() as client:
            await one.says("scales baton-tiny")
            stream = await client.submit(request(40, max_tokens=200))
            await system.until(lambda: system.logged(stream.id, 5))
            one.process.send_signal(signal.SIGTERM)
            await one.says("workers finish what they hold")
            await system.connection.command("PEXPIRE", system.keys.scaler(), 3000)
            await asyncio.sleep(4)
            assert await system.connection.command("EXISTS", system.keys.scaler()) == 1
            assert (await collect(stream))[1].state == "done"
            assert await one.ended() == 0
        assert await system.connection.command("EXISTS", system.keys.scaler()) == 0


@pytest.mark.faults
async def test_a_burst_is_met_with_more_workers_and_loses_nothing(default_redis_url: str, tmp_path: Path) -> None:
    """0 to 6 to 0."""
    bounds = [f"autoscale.{stage}.max_workers=3" for stage in STAGES]
    slow = ("engine.mock.prefill_token_ms=2", "engine.mock.decode_base_ms=20", "engine.mock.max_num_seqs=4")
    async with running(default_redis_url, tmp_path, *bounds, *slow) as system, autoscale(system) as one:
        await one.says("scales baton-tiny")
        async with system.client() as client:

            async def ask(number: int) -> str:
                await asyncio.sleep(0.1 * number)
                prompt = [3 + number, *range(3, 202)]  # none is in a prefix cache
                return (await collect(await client.submit(request(prompt, max_tokens=60))))[1].state

            # When 100 requests come within ten seconds
            most = 0

            async def count() -> None:
                nonlocal most
                while True:
                    most = max(most, await workers(system))
                    await asyncio.sleep(0.2)

            counting = asyncio.create_task(count())
            states = await asyncio.gather(*(ask(number) for number in range(100)))

            # Then as many workers as there may be come, and every request is answered
            assert states == ["done"] * 100
            counting.cancel()
            assert most == 6

            # And they go again
            await system.until(lambda: one.output.count(" has gone") == one.output.count(" serves after "))
        assert await workers(system) == 0
        assert await system.at_rest() == {}
        assert await leaves(one) == 0


@pytest.mark.faults
async def test_a_second_signal_kills(default_redis_url: str, tmp_path: Path) -> None:
    settings = ("engine.mock.decode_base_ms=50", "worker.lease_s=60")
    async with running(default_redis_url, tmp_path, *settings) as system, autoscale(system) as one:
        await one.says("scales baton-tiny")
        async with system.client() as client:
            stream = await client.submit(request(40, max_tokens=1000))
            await system.until(lambda: system.logged(stream.id, 5))
            family = one.family
            one.process.send_signal(signal.SIGINT)
            await one.says("workers finish what they hold")
            one.process.send_signal(signal.SIGINT)
            assert await one.ended() == 130
            assert left_over(family) == []
            assert await system.counter("waiting:decode:default") == 1  # for whoever comes
            await stream.cancel("test")


async def test_once_prints_a_decision_and_starts_nothing(default_redis_url: str, tmp_path: Path) -> None:
    async with running(default_redis_url, tmp_path, "autoscale.decode.min_workers=2") as system:
        async with autoscale(system, "--once", "--json") as one:
            assert await one.ended() == 0
        assert '"stage": "decode", "before": 2' in one.output
        assert await system.connection.command("EXISTS", system.keys.scaler()) == 0


async def test_up_with_autoscale_starts_with_nothing_answers_and_leaves_nothing(short_dir: Path) -> None:
    keys = (
        "--set",
        f"redis.run_dir={short_dir / 'run'}",
        "--set",
        f"pools.{POOL}.engine=mock",
        "--set",
        f"pools.{POOL}.tokenizer=none",
    )
    async with up("--autoscale", "--batch", "0", *keys) as one:
        await one.says("serving; Ctrl-C")
        assert "-m workers" not in " ".join(" ".join(child.cmdline()) for child in one.family)
        url = (await one.says(r"http://127\.0\.0\.1:\d+"))[0]
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http:
            body = {"model": POOL, "prompt": [5] * 40, "max_tokens": 7}
            answer = (await http.post("/v1/completions", json=body)).json()
        assert answer["usage"]["completion_tokens"] == 7
        family = one.family
        assert await leaves(one) == 0
        assert left_over(family) == []
