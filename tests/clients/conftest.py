"""One running Baton for all programs of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """The built-in model on the torch engine, with embeddings. Its Redis is its own: others of this session empty theirs."""
    settings = (f"pools.{POOL}.engine=torch", f"pools.{POOL}.embeddings=true")
    logs = tmp_path_factory.mktemp("served")
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with serving(server, logs, *settings, stages="prefill decode embed") as served:
            yield served
