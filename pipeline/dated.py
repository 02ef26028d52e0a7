"""What files and batches have in common: ids that say when something was made, and records that are hashes in Redis."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from typing import Any, TypeVar

import msgspec
import structlog

from pipeline.connection import Connection
from pipeline.protocol import UNREADABLE
from pipeline.snapshot import text_pairs

_DIGITS, _RANDOM_BYTES = 14, 16

log = structlog.get_logger("baton.records")
R = TypeVar("R", bound=msgspec.Struct)


class Ids:
    """Ids with a prefix. In their order they are in the order of their making; behind the time are 128 random bits."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pattern = re.compile(rf"{prefix}[0-9a-f]{{{_DIGITS + 2 * _RANDOM_BYTES}}}")

    def new(self, now_s: float) -> str:
        """One that nobody has or guesses."""
        return f"{self._prefix}{int(now_s * 1e6):0{_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"

    def has(self, text: str) -> bool:
        """Whether a text is an id of something that there may be or have been."""
        return self._pattern.fullmatch(text) is not None

    def made_s(self, one: str) -> float:
        """When an id was made, in s since 1970."""
        return int(one.removeprefix(self._prefix)[:_DIGITS], 16) / 1e6


async def found(connection: Connection, kind: type[R], key: str) -> R | None:
    """The record under a key; None where there is none. Raises RedisUnavailable."""
    return _decoded(kind, await connection.command("HGETALL", key))


async def all_found(connection: Connection, kind: type[R], keys: Collection[str]) -> list[R]:
    """Those that there are. Raises RedisUnavailable."""
    if not keys:
        return []
    rows = await connection.commands(*[("HGETALL", key) for key in keys])
    return [record for row in rows if (record := _decoded(kind, row)) is not None]


def _decoded(kind: type[R], row: Any) -> R | None:
    try:
        fields = text_pairs(row)
        return msgspec.convert(fields, kind, strict=False) if fields else None
    except UNREADABLE as error:
        log.error("a record is not readable by this version", kind=kind.__name__, error=str(error))
        return None
