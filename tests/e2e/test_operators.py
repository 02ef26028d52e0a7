"""What an operator types, against real workers and every Redis found: revoke, purge, dead letters, events, status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.queue import Admission, LaneLook, Limits, PoolQueue
from tests.e2e.processes import children
from tests.e2e.test_control import blocks_used, state_is
from tests.system import POOL, System, collect, request

REPOSITORY = Path(__file__).parents[2]
LIMITS = Limits(max_waiting_tasks=999, max_waiting_tokens=99_999, deadline_s=60, result_ttl_s=60)
SLOW = "engine.mock.decode_base_ms=20"


async def baton(url: str, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own, beside this test's event loop."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    command = [sys.executable, "-m", "pipeline.cli", *words, "--set", f"redis.url={url}"]
    return await asyncio.to_thread(
        subprocess.run, command, cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=60, input=text
    )


async def told(url: str, *words: str) -> Any:
    """What it says as JSON."""
    result = await baton(url, *words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


async def test_status_and_inspect_speak_as_celery_does(default_redis_url: str, tmp_path: Path) -> None:
    url = default_redis_url
    nobody = await baton(url, "status", "-t", "0.2")
    assert (nobody.returncode, nobody.stdout) == (69, "")
    assert nobody.stderr == "Error: No nodes replied within time constraint\n"
    async with System(url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        (decode,), (prefill,) = await system.alive("decode"), await system.alive("prefill")
        status = await baton(url, "status", "-t", "20")
        assert status.stdout == f"->  {decode}: OK\n->  {prefill}: OK\n\n2 nodes online.\n"
        ping = await baton(url, "inspect", "-d", decode, "-t", "20", "ping")
        assert ping.stdout == f"->  {decode}: OK\n        pong\n\n1 node online.\n"
        assert await told(url, "inspect", "ping", "-t", "20", "-d", f"{prefill},{decode}@{POOL}") == {
            name: {"ok": "pong"} for name in (decode, prefill)
        }
        stranger = await baton(url, "inspect", "ping", "-t", "20", "-d", decode, "-d", "nope")
        assert (stranger.returncode, stranger.stdout) == (69, f"->  {decode}: OK\n        pong\n\n1 node online.\n")
        there = f"registered: {decode}, {prefill}"
        assert stranger.stderr == f"Error: nope: no worker of this name is registered; {there}\n"
        only = await baton(url, "inspect", "ping", "-t", "600", "-d", "nope")  # told at once
        assert (only.returncode, only.stdout, only.stderr) == (69, "", stranger.stderr)
        await PoolQueue(system.connection, POOL).renew("prefill", "deaf", b"", 30)
        silent = await baton(url, "inspect", "ping", "-t", "1", "-d", f"{decode},deaf")
        assert (silent.returncode, silent.stderr) == (69, "Error: deaf: no reply within 1 s\n")
        assert silent.stdout == ping.stdout
        everybody = await baton(url, "status", "-t", "1")
        assert (everybody.returncode, everybody.stderr) == (0, "no reply within 1 s from: deaf\n")
        await PoolQueue(system.connection, POOL).leave("prefill", "deaf")
        active = await baton(url, "inspect", "active", "-t", "20", "-d", decode)
        assert active.stdout == f"->  {decode}: OK\n    - empty -\n\n1 node online.\n"
        assert await told(url, "inspect", "registered", "-t", "20", "-d", decode) == {decode: ["decode"]}
        (stats,) = (await told(url, "inspect", "stats", "-t", "20", "-d", decode)).values()
        assert {
            "total",
            "pid",
            "clock",
            "uptime",
            "held",
            "pool",
            "broker",
            "prefetch_count",
            "rusage",
            "transfer",
        } <= stats.keys()
        (several,) = await told(
            url, "inspect", "ping", "-t", "20", "-d", decode, "--set", "pools.other.engine=mock", "--pool", POOL
        )
        assert several == decode
        two = await told(
            url, "inspect", "ping", "-t", "3", "-d", f"{decode}@{POOL}", "--set", "pools.other.engine=mock"
        )
        assert list(two) == [f"{decode}@{POOL}"]
        paused = await baton(url, "control", "pause", "-t", "20", "-d", decode)
        assert paused.stdout.startswith(f"->  {decode}: OK\n        paused")
        assert f"->  {decode}: OK, paused\n" in (await baton(url, "status", "-t", "20")).stdout


@pytest.mark.parametrize("where", ["waiting", "prefilling", "decoding"])
async def test_revoke_ends_a_request_wherever_it_is_and_frees_its_blocks(
    default_redis_url: str, tmp_path: Path, where: str
) -> None:
    slow = (SLOW, "engine.mock.prefill_base_ms=4000", "engine.mock.prefix_cache=false") if where == "prefilling" else (
        SLOW, "engine.mock.prefix_cache=false"
    )  # fmt: skip
    async with System(default_redis_url, *slow, log_dir=tmp_path) as system, system.client() as client:
        if where != "waiting":
            await system.worker("prefill")
        if where == "decoding":
            await system.worker("decode")
        await system.until(lambda: sees(client, where != "waiting"), 20)
        item = request(100, n=2, max_tokens=5000)
        stream = await client.submit(item)
        stage, state = {"waiting": ("prefill", "queued"), "prefilling": ("prefill", "running")}.get(
            where, ("decode", "running")
        )
        await system.until(lambda: state_is(system, item.id, stage, state), 20)
        if where != "waiting":
            await system.until(lambda: blocks_used(system, stage), 20)
        result = await baton(default_redis_url, "control", "revoke", item.id)
        assert (result.returncode, result.stdout) == (0, f"->  {item.id}: OK\n        revoked\n")
        _, ended = await collect(stream, 2)
        assert (ended.state, ended.reason) == ("cancelled", "revoked")
        if where != "waiting":
            await system.until(lambda: nothing_used(system, stage), 10)
        again = await told(default_redis_url, "control", "revoke", item.id)  # written down: the first answer again
        assert again == {item.id: {"ok": "revoked"}}
        if where == "waiting":
            await system.worker("prefill")  # to take the entry off the lane
        await system.until(system.rests, 10)


async def sees(client: Any, prefill: bool) -> bool:
    return bool((await client.snapshot()).load().prefill_alive) is prefill


async def nothing_used(system: System, stage: str) -> bool:
    return await blocks_used(system, stage) == 0


async def test_an_unknown_request_is_told_as_unknown(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    item = request(30, n=2)
    await queue.admit(Admission(item, "decode", "low", "", priority="low"), LIMITS)
    stranger = request(1).id
    for words in (("control", "revoke"), ("inspect", "query_task")):
        result = await baton(redis_url, *words, stranger, "nonsense")
        assert result.returncode == 1
        assert result.stdout.count("no request has this id, or its record has expired") == 2
    for words in (("dead", "replay", "nope"), ("dead", "drop", "nope")):
        nope = await baton(redis_url, *words)
        assert (nope.returncode, nope.stdout) == (
            1, "->  nope: ERROR\n        no request has this id, or its record has expired\n",
        )  # fmt: skip
    (state,) = (await told(redis_url, "inspect", "query_task", item.id)).values()
    (pasted,) = await told(redis_url, "inspect", "query_task", f"chatcmpl-{item.id}")
    assert pasted == item.id
    assert (state["state"], state["stage"], state["lane"], state["owner"]) == ("queued", "decode", "low", "")
    assert (state["epoch"], state["attempts"], state["tokens"], state["prompt_tokens"]) == (0, 0, [0, 0], 30)
    assert list(state["timeline"]) == ["admitted"]
    await queue.cancel(item.id, "disconnected")
    late = await told(redis_url, "control", "revoke", f"cmpl-{item.id}")
    assert late == {item.id: {"ok": "had ended before: cancelled (disconnected)"}}
    await connection.close()


async def test_purge_ends_what_waits_on_the_chosen_lanes(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    items = {lane: [request(3) for _ in range(count)] for lane, count in (("default", 450), ("low", 2))}
    for lane, requests in items.items():
        for item in requests:
            await queue.admit(Admission(item, "decode", lane, ""), LIMITS)
    running = await queue.claim(
        "decode", "d", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000
    )
    parked = await queue.claim("decode", "d", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000)
    assert running is not None
    assert parked is not None
    await queue.hand_back(parked, "d", counts=False, max_attempts=3, why="test")
    (lanes,) = (await told(redis_url, "inspect", "queues")).values()
    counted = {(lane["stage"], lane["lane"]): (lane["waiting"], lane["prompt_tokens"]) for lane in lanes}
    assert (counted["decode", "default"], counted["decode", "low"]) == ((449, 1347), (2, 6))
    assert min(lane["oldest_s"] for lane in lanes if lane["waiting"]) > 0

    refused = await baton(redis_url, "purge", text="n\n")
    assert refused.returncode == 1
    assert "this ends 451 waiting requests on 6 lanes of baton-tiny as cancelled" in refused.stderr
    assert (await told(redis_url, "inspect", "query_task", parked.id))[parked.id]["state"] == "queued"

    asked = await baton(redis_url, "purge", "--stage", "decode", "--lane", "default", text="y\n")
    assert asked.stdout.endswith("Purged 449 requests from 1 lane.\n")
    ended = await told(
        redis_url, "inspect", "query_task", parked.id, items["default"][-1].id, items["low"][0].id, running.id
    )
    assert [(state["state"], state["reason"]) for state in ended.values()] == [
        ("cancelled", "purged"), ("cancelled", "purged"), ("queued", ""), ("running", ""),
    ]  # fmt: skip
    again = await baton(redis_url, "purge", "-f", "--lane", "default")
    assert again.stdout == "No requests purged from 2 lanes.\n"
    assert sum(row["purged"] for row in await told(redis_url, "purge", "-f")) == 2
    await queue.end(running.id, "failed", worker="d", epoch=running.epoch)
    for _ in range(20):  # the entries leave the lanes as always
        await connection.command("DEL", queue.keys.root + "sweeper")
        await queue.sweep("s", interval_s=1, lease_s=30, max_attempts=3)
    for lane in ("default", "low"):
        assert await connection.command("XLEN", queue.keys.lane("decode", lane)) == 0
        assert await connection.command("HGET", queue.keys.counters(), f"waiting:decode:{lane}") == b"0"
    await connection.close()


async def test_a_request_that_kills_engines_is_a_dead_letter_that_can_be_shown_and_replayed(
    default_redis_url: str, tmp_path: Path
) -> None:
    url = default_redis_url
    async with System(url, SLOW, "worker.max_attempts=1", log_dir=tmp_path) as system, system.client() as client:
        worker = await system.worker(
            "decode", "engine.mock.prefill_base_ms=60000"
        )  # it is killed before its first token
        item = request(30, max_tokens=6)
        stream = await client.submit(item)
        await system.until(lambda: state_is(system, item.id, "decode", "running"), 20)
        [engine] = children(worker)
        os.kill(engine, signal.SIGKILL)
        assert (await collect(stream))[1].state == "dead"
        worker.kill()
        await asyncio.to_thread(worker.wait)

        (row,) = await told(url, "dead", "list")
        assert (row["id"], row["stage"], row["attempts"]) == (item.id, "decode", 1)
        assert "engine's process was ended by SIGKILL" in row["reason"]
        assert row == (await told(url, "inspect", "dead"))[0]
        assert f"  {item.id}  decode, 1 attempt, last by decode-" in (await baton(url, "dead", "list")).stdout
        shown = await told(url, "dead", "show", item.id)
        assert shown["record"]["state"] == "dead"
        assert shown["request"]["input"]["token_ids"] == "30 tokens"

        await system.worker("decode")
        (replayed,) = (await told(url, "dead", "replay", item.id)).values()
        new_id = replayed["replayed_as"]
        assert new_id != item.id
        await system.until(lambda: state_is(system, new_id, "decode", "done"), 20)
        state = (await told(url, "inspect", "query_task", new_id))[new_id]
        assert (state["replay_of"], state["tokens"]) == (item.id, [6])
        assert await told(url, "dead", "list") == []
        twice = await baton(url, "dead", "replay", item.id)
        assert twice.returncode == 1
        assert "no dead letter of pool baton-tiny has this id" in twice.stdout


async def test_a_dead_letter_that_cannot_be_read_can_only_be_dropped(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    ids = []
    for _ in range(2):
        item = request(30)
        await queue.admit(Admission(item, "decode", "default", ""), LIMITS)
        await connection.command("HSET", queue.keys.request(item.id), "body", b"\xc1not a request")
        delivery = await queue.claim(
            "decode", "d", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000
        )
        assert delivery is not None
        assert await queue.hand_back(delivery, "d", counts=True, max_attempts=0, why="not readable") == "dead"
        ids.append(item.id)
    unreadable, expired = ids
    await connection.command("DEL", queue.keys.request(expired))
    assert (
        "not readable, it can be dropped, not replayed"
        in (await told(redis_url, "dead", "show", unreadable))["request"]["error"]
    )
    failed = await baton(redis_url, "dead", "replay", "--all")
    assert failed.returncode == 1
    assert f"->  {unreadable}: ERROR\n        its record is not readable" in failed.stdout
    assert f"->  {expired}: ERROR\n        its record is gone" in failed.stdout
    assert await told(redis_url, "dead", "drop", unreadable) == {unreadable: {"ok": "dropped"}}
    assert await connection.command("EXISTS", queue.keys.request(unreadable)) == 0
    assert await told(redis_url, "dead", "drop", "--all", "-f") == {expired: {"ok": "dropped"}}
    assert (await baton(redis_url, "dead", "list")).stdout == "- empty -\n"
    await connection.close()


async def test_a_replay_respects_the_limits_of_the_queue(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    queue = PoolQueue(connection, POOL)
    item = request(30)
    await queue.admit(Admission(item, "decode", "default", ""), LIMITS)
    delivery = await queue.claim(
        "decode", "d", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=1000
    )
    assert delivery is not None
    await queue.hand_back(delivery, "d", counts=True, max_attempts=0, why="test")
    full = await baton(redis_url, "dead", "replay", item.id, "--set", "queue.max_waiting_tokens=10")
    assert full.returncode == 1
    assert "try again later" in full.stdout
    assert len(await told(redis_url, "dead", "list")) == 1
    (replayed,) = (await told(redis_url, "dead", "replay", item.id)).values()
    assert (await told(redis_url, "inspect", "query_task", replayed["replayed_as"])).popitem()[1]["state"] == "queued"
    await connection.close()


async def test_events_tell_the_life_of_requests_and_workers(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        command = [sys.executable, "-m", "pipeline.cli", "events", "--json", "--set", f"redis.url={default_redis_url}"]
        output, errors = tmp_path / "events", tmp_path / "errors"
        with output.open("wb") as out, errors.open("wb") as err:
            listener = subprocess.Popen(command, cwd=REPOSITORY, env=clean, stdout=out, stderr=err)
        try:
            await system.until(lambda: "starting capture" in errors.read_text(), 20)
            prefill = await system.worker("prefill")
            await system.worker("decode")
            async with system.client() as client:
                await system.until(lambda: sees(client, True), 20)
                item = request(30)
                assert (await collect(await client.submit(item)))[1].state == "done"
                bad = request(30)
                await client.queue.admit(Admission(bad, "prefill", "@nobody", ""), LIMITS)
                await client.queue.cancel(bad.id, "revoked")
            prefill.terminate()
            await system.until(lambda: "prefill" in output.read_text().partition("worker-offline")[2], 20)
        finally:
            listener.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(listener.wait, 20) == 130
        events = [json.loads(line) for line in output.read_text().splitlines()]
        life = [(event["type"], event["stage"]) for event in events if event["id"] == item.id]
        assert life == [
            ("task-sent", "prefill"), ("task-started", "prefill"), ("task-handed-over", "prefill"),
            ("task-started", "decode"), ("task-succeeded", "decode"),
        ]  # fmt: skip
        assert next(event["type"] for event in events if event["id"] == bad.id) == "task-sent"
        assert ("task-revoked", "revoked") in [
            (event["type"], event["detail"]) for event in events if event["id"] == bad.id
        ]
        workers = [(event["type"], event["stage"]) for event in events if not event["id"] and event["stage"] != "api"]
        assert workers[:2] == [("worker-online", "prefill"), ("worker-online", "decode")]
        assert ("worker-offline", "prefill") in workers
        assert min(event["time_us"] for event in events) > 1_600_000_000_000_000
