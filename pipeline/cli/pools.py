"""The pools that a command is about, and a connection to their Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from pipeline.cli.options import Given
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.redis_server import running_redis
from pipeline.settings_file import nearest


class Place(NamedTuple):
    """Where a command works: one pool or all of the settings."""

    settings: Settings
    connection: Connection
    pools: list[str]


@contextlib.asynccontextmanager
async def connected(source: Given, pool: str | None) -> AsyncIterator[Place]:
    """Raises `ConfigError` for an unknown pool, `RedisUnavailable` when there is no Redis."""
    settings = source.settings()
    if pool is not None and pool not in settings.pools:
        raise ConfigError(f"--pool: unknown pool {pool}{nearest(pool, settings.pools)}")
    connection = Connection(running_redis(settings.redis))
    try:
        yield Place(settings, connection, [pool] if pool else list(settings.pools))
    finally:
        await connection.close()
