"""Where API keys are kept: in Redis, for all pools and replicas at once, and in a file of the operator's (`api.keys_file`).

The file is TOML, one table a key; what its fields are is in `ApiKey`:

[team-a]
digest = "9f86d081..."          # SHA-256 of the key: `baton keys create team-a --file` prints such a table
requests_per_minute = 60
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from pipeline.api_keys import ApiKey
from pipeline.connection import Connection, Script
from pipeline.errors import ConfigError, NotFound
from pipeline.keys import API_KEYS_ROOT, api_keys, api_keys_version
from pipeline.protocol import UNREADABLE

log = structlog.get_logger("baton.keys")


class KeyTable(NamedTuple):
    """All keys by their digest, and when one was changed last; None where Redis has none."""

    keys: Mapping[str, ApiKey]
    version: bytes | None


class KeyStore:
    """The keys in Redis. Every method raises `RedisUnavailable`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._put = Script("put_key")

    async def version(self) -> bytes | None:
        """Changes with every change of a key."""
        version: bytes | None = await self._connection.command("GET", api_keys_version())
        return version

    async def read(self) -> KeyTable:
        """All keys, those revoked too. One that this version cannot read is left out, and so refused."""
        version = await self.version()  # first: what changes while the rest is read is read again
        rows = await self._connection.command("HGETALL", api_keys())
        pairs = rows.items() if isinstance(rows, dict) else zip(rows[0::2], rows[1::2], strict=True)
        keys = [key for digest, row in pairs if (key := _decoded(digest, row)) is not None]
        return KeyTable({key.digest: key for key in keys}, version)

    async def put(self, key: ApiKey) -> None:
        """Keep a key, or what has changed of it."""
        await self._connection.call(self._put, API_KEYS_ROOT, key.digest, msgspec.msgpack.encode(key))

    async def find(self, name_or_id: str) -> ApiKey:
        """The valid key of that name, else the one of that id. Raises NotFound."""
        keys = (await self.read()).keys.values()
        found = next((key for key in keys if key.name == name_or_id and not key.revoked_s), None)
        found = found or next((key for key in keys if key.id == name_or_id), None)
        if found is None:
            raise NotFound(
                f"{name_or_id[:100]}: no key in Redis has this name or id; `baton keys list` shows those there are"
            )
        return found


def _decoded(digest: bytes, row: bytes) -> ApiKey | None:
    try:
        return msgspec.msgpack.decode(row, type=ApiKey)
    except UNREADABLE as error:
        log.error(
            "an API key is not readable by this version, so it is refused", digest=digest.decode(), error=str(error)
        )
        return None


def read_keys_file(path: str) -> list[ApiKey]:
    """The keys of a file; none where no file is named. Raises ConfigError, which names the table and its field."""
    if not path:
        return []
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"api.keys_file: {path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"api.keys_file: {path}: is not TOML: {error}") from error
    return [_of_table(path, name, table) for name, table in tables.items()]


class KeysFile:
    """The keys of a file, by their digest, read again when it has changed, or when another is in its place, as clusters do with secrets.

    The first time it has to be right (ConfigError); what is wrong with it later is said, and the keys of before stay.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read = _stamp(path)
        self._said = ""  # what was wrong with it, which is said once
        self.keys = _by_digest(read_keys_file(path))

    def look(self) -> None:
        """Read it if it has changed."""
        stamp = _stamp(self._path)  # first: what changes while it is read is read again
        if stamp == self._read:
            return
        try:
            keys = read_keys_file(self._path)
        except ConfigError as error:
            if str(error) != self._said:
                log.error(
                    "the file of API keys has changed and is not readable, its keys stay as they were", error=str(error)
                )
            self._said = str(error)
        else:
            self.keys, self._read, self._said = _by_digest(keys), stamp, ""
            log.info("the file of API keys has changed", path=self._path, keys=len(keys))


def _stamp(path: str) -> tuple[int, ...]:
    """Changes with a file; empty where there is none."""
    try:
        found = Path(path).stat() if path else None
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size) if found else ()


def _by_digest(keys: list[ApiKey]) -> Mapping[str, ApiKey]:
    return {key.digest: key for key in keys}


def _of_table(path: str, name: str, table: object) -> ApiKey:
    if not isinstance(table, dict):
        raise ConfigError(f"api.keys_file: {path}: {name}: expected a table [{name}]")
    try:
        return msgspec.convert({"name": name, **table}, ApiKey)
    except msgspec.ValidationError as error:
        raise ConfigError(f"api.keys_file: {path}: [{name}]: {error}") from error
