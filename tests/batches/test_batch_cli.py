"""`baton batch` as a user runs it, against real processes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from rich.console import Console

from pipeline.cli.batch_progress import Counts, Pace, figures, progress
from pipeline.cli.batches import endpoint_of, pairs
from pipeline.errors import ConfigError
from pipeline.redis_server import RedisServer
from tests.batches.running import CHATS, QUICK, TEXTS, Batching, batching, chat_line, text_line
from tests.serving import serving
from tests.system import System

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 90
SLOW = ("engine.mock.decode_base_ms=20", "batches.max_in_flight=4")


class Ended(NamedTuple):
    """What came of a command."""

    code: int | None
    out: str
    err: str


@contextlib.asynccontextmanager
async def started(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`baton batch ...` in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pipeline.cli", "batch", *words,
        cwd=REPOSITORY, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def baton(*words: str) -> Ended:
    """The command, to its end."""
    async with asyncio.timeout(LIMIT_S), started(*words) as process:
        out, err = await process.communicate()
        return Ended(process.returncode, out.decode(), err.decode())


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ids_in(text: str) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in text.splitlines())


async def test_a_file_is_sent_waited_for_and_its_results_are_written(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path) as it:
        file, out, url = (
            written(tmp_path, [chat_line(str(n)) for n in range(30)]),
            tmp_path / "out.jsonl",
            it.served.url,
        )
        ended = await baton(
            "submit", str(file), "--metadata", "of=tests", "--window", "1h", "-o", str(out), "--url", url
        )
        assert ended.code == 0, ended
        batch_id = ended.out.split()[0]
        assert ended.out == f"{batch_id} completed: 30 of 30 requests succeeded, 0 failed\n"
        assert f"for {CHATS}, within 1h" in ended.err
        assert f"written: {out}" in ended.err.replace("\n", "")
        assert ids_in(out.read_text()) == sorted(str(n) for n in range(30))
        assert not list(tmp_path.glob("*.part"))
        status = json.loads((await baton("status", batch_id, "--json", "--url", url)).out)
        assert (status["status"], status["metadata"], status["completion_window"]) == (
            "completed",
            {"of": "tests"},
            "1h",
        )
        listed = await baton("list", "--url", f"{url}/v1")
        assert listed.out.startswith(f"{batch_id} completed         30/30     0 failed    1h ")
        results = await baton("results", batch_id, "--url", url)
        assert (results.code, results.out, results.err) == (0, out.read_text(), "")
        errors = await baton("results", batch_id, "--errors", "--url", url)
        assert (errors.code, errors.out) == (1, "")
        assert "no request failed" in errors.err


async def test_a_local_file_is_answered_without_an_api(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with running_alone(default_redis_server, tmp_path) as (system, given):
        lines = [chat_line(str(n)) for n in range(20)] + [chat_line("wrong", top_logprobs=3, logprobs=False)]
        out, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
        wrong = await baton("run", str(written(tmp_path, lines)), "-o", str(out), *given)
        assert wrong.code == 1, wrong
        assert "failed: 0 of 0 requests succeeded" in wrong.err and "line 21: " in wrong.err
        assert not out.exists()
        lines[-1] = chat_line("too long", max_tokens=10_000_000)
        ended = await baton("run", str(written(tmp_path, lines)), "-o", str(out), "--errors", str(errors), *given)
        assert ended.code == 1, ended
        assert "completed: 20 of 21 requests succeeded, 1 failed" in ended.err
        assert ids_in(out.read_text()) == sorted(str(n) for n in range(20))
        assert ids_in(errors.read_text()) == ["too long"]
        printed = await baton("run", str(written(tmp_path, lines[:5])), *given)
        assert (printed.code, ids_in(printed.out)) == (0, list("01234"))
        assert not await system.connection.command("KEYS", "{@files}:file:*")
        assert [path for path in (tmp_path / "files").rglob("*") if path.is_file()] == []
        await system.until(system.rests, 10)


async def test_a_batch_that_is_refused_leaves_no_file(default_redis_server: RedisServer, tmp_path: Path) -> None:
    overrides = (f"files.url={tmp_path / 'files'}", "batches.max_bytes=100")
    async with serving(default_redis_server, tmp_path, *overrides, stages="") as served:
        file = written(tmp_path, [chat_line("1")])
        given = [word for one in served.system.overrides for word in ("--set", one)]
        for words in (["submit", str(file), "--url", served.url], ["run", str(file), *given]):
            refused = await baton(*words)
            assert refused.code != 0 and "a batch at most 100 " in refused.err, refused
            assert not await served.system.connection.command("KEYS", "{@files}:file:*")
            assert [path for path in (tmp_path / "files").rglob("*") if path.is_file()] == []


async def test_ctrl_c_cancels_a_local_batch_and_brings_what_was_answered(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with running_alone(default_redis_server, tmp_path, *SLOW) as (system, given):
        file = written(tmp_path, [chat_line(str(n), max_tokens=20) for n in range(300)])
        out, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
        async with (
            asyncio.timeout(LIMIT_S),
            started("run", str(file), "-o", str(out), "--errors", str(errors), *given) as running,
        ):

            async def has_some() -> bool:
                return await system.counter("ended:done") > 3

            await system.until(has_some, 60)
            family = psutil.Process(running.pid).children(recursive=True)
            assert any("workers" in one.cmdline() for one in family)
            running.send_signal(signal.SIGINT)
            _, said = await running.communicate()
        assert running.returncode == 1, said
        assert b"cancelled: " in said
        assert sorted(map(int, ids_in(out.read_text() + errors.read_text()))) == list(range(300))
        assert len(ids_in(out.read_text())) > 3
        psutil.wait_procs(family, timeout=10)
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)


async def test_a_local_batch_whose_worker_dies_is_left_to_others(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with running_alone(default_redis_server, tmp_path, *SLOW) as (system, given):
        file = written(tmp_path, [chat_line(str(n), max_tokens=20) for n in range(300)])
        async with asyncio.timeout(LIMIT_S), started("run", str(file), *given) as running:

            async def has_some() -> bool:
                return await system.counter("ended:done") > 3

            await system.until(has_some, 60)
            for one in psutil.Process(running.pid).children():
                one.kill()
            _, said = await running.communicate()
        assert running.returncode == 1, said
        assert b"its batch worker was ended by SIGKILL; it goes on when a batch worker comes" in said


@contextlib.asynccontextmanager
async def running_alone(
    server: RedisServer, folder: Path, *overrides: str
) -> AsyncIterator[tuple[System, tuple[str, ...]]]:
    """Workers without an API, and the words that lead a command to them."""
    assert server.command("FLUSHALL") == b"+OK"
    async with System(server.url, *QUICK, *overrides, log_dir=folder) as system:
        await asyncio.gather(system.worker("prefill"), system.worker("decode"))
        yield system, tuple(word for one in system.overrides for word in ("--set", one))


async def test_ctrl_c_leaves_a_batch_running_and_says_how_to_go_on(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, *SLOW) as it:
        file, url = written(tmp_path, [text_line(str(n), max_tokens=10) for n in range(200)]), it.served.url
        submitted = await baton("submit", str(file), "--url", url)
        assert submitted.code == 0, submitted
        batch_id = submitted.out.strip()
        assert f"baton batch status {batch_id} --wait --url {url}" in submitted.err
        async with asyncio.timeout(LIMIT_S), started("status", batch_id, "--wait", "--url", url) as waiting:
            assert waiting.stderr is not None
            while b"in_progress" not in await waiting.stderr.readline():
                pass
            waiting.send_signal(signal.SIGINT)
            said = (await waiting.stderr.read()).decode()
            assert await waiting.wait() == 130
        assert f"{batch_id} is left running" in said
        assert f"baton batch cancel {batch_id} --url {url}" in said
        early = await baton("results", batch_id, "--url", url)
        assert (early.code, early.out) == (1, "")
        await some_are_done(it, batch_id)
        assert (await baton("cancel", batch_id, "--url", url)).out.startswith(f"{batch_id} cancelling")
        ended = await baton("status", batch_id, "--wait", "--url", url)
        assert ended.code == 1
        assert ended.out.startswith(f"{batch_id} cancelled: ")
        done, missing = [(await baton("results", batch_id, *more, "--url", url)).out for more in ((), ("--errors",))]
        assert sorted(map(int, ids_in(done + missing))) == list(range(200))
        assert len(done) > 0


async def some_are_done(it: Batching, batch_id: str) -> None:
    async def are() -> bool:
        return (await it.client.batches.retrieve(batch_id)).request_counts.completed > 0  # type: ignore[union-attr]

    await it.served.system.until(are, 60)


async def test_what_is_wrong_is_one_line_with_its_exit_code(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with batching(default_redis_server, tmp_path) as it:
        url = it.served.url
        bad = written(tmp_path, [text_line("1"), text_line("1"), text_line("2", model="gpt-5")])
        failed = await baton("submit", str(bad), "--wait", "--url", url)
        assert failed.code == 1
        assert " failed: 0 of " in failed.out
        assert "line 2: custom_id '1' is that of line 1 already (duplicate_custom_id)" in failed.err
        assert "line 3: " in failed.err
        for words, code, message in [
            (("status", "batch_" + "0" * 46, "--wait", "--url", url), 1, "baton: the API refuses this: No batch found with id"),
            (("list", "--url", "http://127.0.0.1:9"), 4, "baton: no answer from http://127.0.0.1:9"),
            (("submit", str(bad), "--window", "soon", "--url", url), 2, "baton: completion_window: expected 24h or another number"),
            (("submit", str(bad), "--endpoint", "/v1/chat", "--url", url), 2, "baton: endpoint: invalid enum value '/v1/chat', expected "),
            (("submit", str(bad), "--metadata", "x", "--url", url), 2, "baton: --metadata x: expected KEY=VALUE"),
            (("submit", str(tmp_path / "none"), "--url", url), 2, "Usage: baton batch submit"),
        ]:  # fmt: skip
            ended = await baton(*words)
            assert (ended.code, ended.out) == (code, ""), ended
            assert ended.err.startswith(message)


def test_the_endpoint_is_that_of_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(text_line("1")).encode() + b"\r\n")
    assert endpoint_of(file) == TEXTS
    file.write_text("\n\n" + json.dumps(chat_line("1")))
    assert endpoint_of(file) == CHATS
    says = "--endpoint says which one"
    for wrong, said in (("", "no line"), ("\n\n", "no line"), ("no JSON\n", says), ('{"custom_id": "1"}\n', says)):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            endpoint_of(file)


def test_metadata_may_hold_equals_signs() -> None:
    assert pairs(["a=b=c", "d="]) == {"a": "b=c", "d": ""}


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress(console, "batch_1") as tell:
        tell("validating", Counts())
        tell("in_progress", Counts(10, 2, 1))
    assert "in_progress" in out.getvalue()
    assert "3/10" in out.getvalue()
    assert "1 failed" in out.getvalue()


def test_figures_tell_what_failed_the_rate_and_the_time_left() -> None:
    assert figures(Counts(10, 2, 1), 0.0) == "1 failed"
    assert figures(Counts(1000, 400, 0), 80.0) == "80.0/s, 0:00:08 left"
    assert figures(Counts(1000, 997, 3), 80.0) == "3 failed, 80.0/s"
    assert figures(Counts(), 0.0) == ""


def test_a_pace_is_that_since_the_first_look() -> None:
    pace = Pace()
    assert pace.per_s(10, 100.0) == 0
    assert pace.per_s(40, 110.0) == 3
