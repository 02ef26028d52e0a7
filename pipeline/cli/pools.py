"""The pools that a command is about, and a connection to their Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

from pipeline.cli.options import Given
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.ids import bare_id
from pipeline.logs import configure
from pipeline.redis_server import running_redis
from pipeline.settings_file import nearest


class Place(NamedTuple):
    """Where a command works: one pool or all of the settings."""

    settings: Settings
    connection: Connection
    pools: list[str]

    def bare(self, ids: Iterable[str]) -> list[str]:
        """Request ids as the settings' pools have them, whatever answer they were copied from."""
        return [bare_id(request_id, self.settings.pools) for request_id in ids]


@contextlib.asynccontextmanager
async def connected(source: Given, pool: str | None) -> AsyncIterator[Place]:
    """Raises `ConfigError` for an unknown pool, `RedisUnavailable` when there is no Redis."""
    settings = source.settings()
    if pool is not None and pool not in settings.pools:
        raise ConfigError(f"--pool: unknown pool {pool}{nearest(pool, settings.pools)}")
    configure(settings.log, "baton")
    connection = Connection(running_redis(settings.redis))
    try:
        yield Place(settings, connection, [pool] if pool else list(settings.pools))
    finally:
        await connection.close()
