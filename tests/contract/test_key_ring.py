"""The keys that a process knows: what it hears of changes, and what it does while Redis is away or has lost them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.key_ring import KNOWN_FOR_S, KeyRing
from pipeline.api_keys import ApiKey
from pipeline.cli.keys import MadeKey, new_key
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import ConfigError, InvalidKey, RedisUnavailable
from pipeline.key_store import KeysFile, KeyStore
from pipeline.keys import api_keys
from pipeline.redis_server import RedisServer


class Clock:
    """Stands still unless it is set."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def made(name: str = "a", **fields: Any) -> MadeKey:
    return new_key(name, expires_in=None, **fields)


class FileOf(KeysFile):
    """A file of keys that does not change."""

    def __init__(self, *keys: ApiKey) -> None:
        super().__init__("")
        self.keys = {key.digest: key for key in keys}


def ring_of(store: KeyStore, *of_file: ApiKey, file: KeysFile | None = None, **fields: Any) -> KeyRing:
    return KeyRing(
        store, file or FileOf(*of_file), **({"mode": "auto", "host": "127.0.0.1", "refresh_s": 60.0} | fields)
    )


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    connection = Connection(RedisSettings(url=redis_url))
    yield connection
    await connection.close()


async def test_a_key_is_found_by_its_secret_alone(connection: Connection) -> None:
    store, key = KeyStore(connection), made(models=["m"], concurrent_requests=3)
    await store.put(key.key)
    ring = ring_of(store)
    await ring.load()
    assert await ring.key_of(key.secret) == key.key
    for wrong in (None, "", "x", key.secret[:-1], key.secret + "x", key.key.digest, "\udcff", "y" * 100_000):
        with pytest.raises(InvalidKey):
            await ring.key_of(wrong)


async def test_no_secret_stands_in_redis(connection: Connection) -> None:
    key = made()
    await KeyStore(connection).put(key.key)
    assert key.secret.encode() not in b"".join(await connection.command("HVALS", api_keys()))


async def test_the_first_key_closes_the_server_and_losing_all_of_them_does_not_open_it(connection: Connection) -> None:
    store, ring = KeyStore(connection), ring_of(KeyStore(connection))
    await ring.load()
    assert not ring.needs_key
    await store.put(made().key)
    await ring.look()
    assert ring.needs_key
    await connection.command("FLUSHALL")
    await ring.look()
    assert ring.needs_key


async def test_a_revoked_key_is_refused_and_others_go_on(connection: Connection) -> None:
    store, one, other = KeyStore(connection), made("one"), made("other")
    ring = ring_of(store)
    for key in (one, other):
        await store.put(key.key)
    await ring.load()
    await store.put(msgspec.structs.replace(one.key, revoked_s=int(time.time())))
    await ring.look()
    with pytest.raises(InvalidKey):
        await ring.key_of(one.secret)
    assert (await ring.key_of(other.secret)).name == "other"


async def test_a_new_key_works_at_once(connection: Connection) -> None:
    store, ring = KeyStore(connection), ring_of(KeyStore(connection), mode="required")
    await ring.load()
    key = made()
    await store.put(key.key)
    found = await asyncio.gather(*(ring.key_of(key.secret) for _ in range(50)))
    assert {each.id for each in found} == {key.key.id}


async def test_made_up_keys_do_not_ask_redis_each_time(connection: Connection) -> None:
    ring = ring_of(KeyStore(connection), mode="required")
    await ring.load()
    before = await commands_of(connection)
    told = await asyncio.gather(*(ring.key_of(f"baton-sk-{number}") for number in range(200)), return_exceptions=True)
    assert {type(error) for error in told} == {InvalidKey}
    assert await commands_of(connection) - before < 10


async def commands_of(connection: Connection) -> int:
    return int((await connection.command("INFO", "stats"))["total_commands_processed"])


async def test_a_key_made_after_redis_lost_everything_is_heard_of(connection: Connection) -> None:
    store, lost, new = KeyStore(connection), made("lost"), made("new")
    await store.put(lost.key)
    ring = ring_of(store)
    await ring.load()
    await connection.command("FLUSHALL")
    await store.put(new.key)
    await ring.look()
    assert (await ring.key_of(new.secret)).name == "new"
    with pytest.raises(InvalidKey):
        await ring.key_of(lost.secret)


async def test_a_key_of_a_newer_version_is_refused_and_said(connection: Connection) -> None:
    store, key = KeyStore(connection), made()
    await store.put(key.key)
    row = msgspec.msgpack.encode(msgspec.to_builtins(key.key) | {"weekdays_only": True})
    await connection.command("HSET", api_keys(), key.key.digest, row)
    ring = ring_of(store, mode="required")
    await ring.load()
    with pytest.raises(InvalidKey):
        await ring.key_of(key.secret)


async def test_a_server_for_others_does_not_start_without_a_key(connection: Connection) -> None:
    store = KeyStore(connection)
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0'.*baton keys create"):
        await ring_of(store, host="0.0.0.0").load()
    for told in ({"mode": "off"}, {"mode": "required"}):
        await ring_of(store, host="0.0.0.0", **told).load()
    await ring_of(store, made().key, host="0.0.0.0").load()
    await store.put(made().key)
    await ring_of(store, host="0.0.0.0").load()


async def test_while_redis_is_away_known_keys_work_and_of_others_nobody_knows(short_dir: Path) -> None:
    server = RedisServer.start(short_dir)
    server.wait_ready()
    connection = Connection(RedisSettings(url=server.url, timeout_s=0.5))
    store, known, of_file = KeyStore(connection), made("known"), made("of-file")
    await store.put(known.key)
    clock = Clock()
    ring = ring_of(store, of_file.key, clock=clock)
    await ring.load()
    server.process.kill()
    server.stop()
    with pytest.raises(RedisUnavailable):
        await ring.look()
    assert (await ring.key_of(known.secret)).name == "known"
    assert (await ring.key_of(of_file.secret)).name == "of-file"
    with pytest.raises(RedisUnavailable):
        await ring.key_of(made().secret)

    # After minutes nobody can say any more whether it was revoked
    clock.now_s += KNOWN_FOR_S + 1
    with pytest.raises(RedisUnavailable):
        await ring.key_of(known.secret)
    assert (await ring.key_of(of_file.secret)).name == "of-file"
    await connection.close()


def written(file: Path, *keys: ApiKey) -> None:
    """As a cluster changes a mounted secret: another file in its place."""
    new = file.with_suffix(".new")
    new.write_text("".join(f'[{key.name}]\ndigest = "{key.digest}"\n' for key in keys))
    new.rename(file)


async def test_a_file_of_keys_that_changes_is_heard_of(connection: Connection, tmp_path: Path) -> None:
    file, one, other = tmp_path / "keys.toml", made("one"), made("other")
    written(file, one.key)
    ring = ring_of(KeyStore(connection), file=KeysFile(str(file)), mode="required")
    await ring.load()
    written(file, other.key)
    assert (await ring.key_of(other.secret)).name == "other"  # unknown until now: looked at again, at once
    with pytest.raises(InvalidKey):
        await ring.key_of(one.secret)


async def test_a_file_of_keys_is_looked_at_also_while_redis_is_away(short_dir: Path, tmp_path: Path) -> None:
    server = RedisServer.start(short_dir)
    server.wait_ready()
    connection = Connection(RedisSettings(url=server.url, timeout_s=0.5))
    file, one, other = tmp_path / "keys.toml", made("one"), made("other")
    written(file, one.key)
    ring = ring_of(KeyStore(connection), file=KeysFile(str(file)), mode="required")
    await ring.load()
    server.process.kill()
    server.stop()
    written(file, other.key)
    with pytest.raises(RedisUnavailable):
        await ring.look()
    assert (await ring.key_of(other.secret)).name == "other"
    with pytest.raises(RedisUnavailable):
        await ring.key_of(one.secret)  # by now it may be one of Redis's
    await connection.close()


async def test_the_first_key_of_a_file_closes_the_server(connection: Connection, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    written(file)
    ring = ring_of(KeyStore(connection), file=KeysFile(str(file)))
    await ring.load()
    assert not ring.needs_key
    written(file, made().key)
    await ring.look()
    assert ring.needs_key
