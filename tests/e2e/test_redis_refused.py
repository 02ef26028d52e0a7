"""A Redis that is not there, hangs or refuses, as a user sees it: one wording, no internals, the documented exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.redis_server import RedisServer

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 60
WORKER = ("worker", "words", "--app", "tests.example_stage")
API = ("api", "--set", "api.port=0")
ASKING = [
    ("status",), ("inspect", "queues"), ("inspect", "query_task", "baton-tiny-0000000000000000000000"), ("events",),
    ("control", "revoke", "baton-tiny-0000000000000000000000"), ("purge", "-f"), ("dead", "list"), ("config", "set-router"),
]  # fmt: skip


def command(url: str, *words: str, connect_s: float = 0.0) -> list[str]:
    settings = [f"redis.url={url}", "redis.timeout_s=0.5", f"redis.connect_s={connect_s}"]
    return [sys.executable, "-m", "pipeline.cli", *words, *(word for one in settings for word in ("--set", one))]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}


def baton(url: str, *words: str, connect_s: float = 0.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(url, *words, connect_s=connect_s), cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip


@pytest.mark.parametrize("words", [WORKER, ("worker", "decode"), API], ids=" ".join)
def test_a_process_that_starts_asks_for_a_time_and_then_says_what_is_wrong(
    short_dir: Path, words: tuple[str, ...]
) -> None:
    result = baton(f"unix://{short_dir}/none.sock", *words, connect_s=1.5)
    assert result.returncode == 4
    assert result.stderr.count("waiting for Redis") == 2
    assert "trying again in 1 s" in result.stderr
    *_, last = result.stderr.splitlines()
    why = f"Redis at unix://{short_dir}/none.sock does not answer (No such file or directory)"
    assert last == f"baton {words[0]}: {why}"
    assert "[config]" not in result.stderr  # no banner of what never began
    assert "{baton-tiny}" not in result.stderr


def test_a_worker_that_is_there_before_its_redis_begins_when_that_comes(short_dir: Path) -> None:
    url = f"unix://{short_dir}/redis.sock"
    worker = subprocess.Popen(
        command(url, *WORKER, connect_s=60), cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert worker.stderr is not None
        assert "waiting for Redis" in worker.stderr.readline()
        with RedisServer.start(short_dir) as server:
            server.wait_ready()
            assert any("ready." in line for line in worker.stderr)
            worker.terminate()
            assert worker.wait(LIMIT_S) == 0
    finally:
        worker.kill()
        worker.communicate()


def test_a_worker_that_waits_for_redis_leaves_when_it_is_told(short_dir: Path) -> None:
    worker = subprocess.Popen(
        command(f"unix://{short_dir}/none.sock", *WORKER, connect_s=60), cwd=REPOSITORY, env=environment(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stderr is not None
    assert "waiting for Redis" in worker.stderr.readline()
    worker.terminate()
    rest = worker.communicate(timeout=LIMIT_S)[1]
    assert (worker.returncode, "Traceback" in rest) == (0, False)


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_a_command_says_it_in_one_line(short_dir: Path, words: tuple[str, ...]) -> None:
    gone = f"unix://{short_dir}/none.sock"
    result = baton(gone, *words)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == f"baton: Redis at {gone} does not answer (No such file or directory)\n"


def test_commands_say_it_of_a_redis_that_hangs(short_dir: Path) -> None:
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            for words in (("status",), ("dead", "list"), ("purge", "-f")):
                result = baton(server.url, *words)
                assert (result.returncode, result.stdout) == (4, "")
                assert result.stderr == f"baton: Redis at {server.url} does not answer (nothing within 0.5 s)\n"
        finally:
            os.kill(server.process.pid, signal.SIGCONT)


def test_a_wrong_password_is_told_at_once_and_shown_to_nobody(short_dir: Path) -> None:
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        assert server.command("CONFIG", "SET", "requirepass", "right") == b"+OK"
        url = f"unix://:secret@{server.socket_path}"
        result = baton(url, *WORKER, connect_s=600)
        server.process.terminate()  # it would not take an order without its password
    assert result.returncode == 4
    assert "waiting for Redis" not in result.stderr
    assert f"baton worker: Redis at unix://:***@{server.socket_path} refuses the user or password" in result.stderr
    refused = baton("redis://:secret@127.0.0.1:9/0", "status")
    assert refused.stderr == "baton: Redis at redis://:***@127.0.0.1:9/0 does not answer (Connection refused)\n"
