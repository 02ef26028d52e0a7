"""Batches and the API keys that made them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from pipeline.batches.record import BatchRecord
from pipeline.batches.records import BatchRecords
from pipeline.cli.keys import MadeKey, new_key
from pipeline.key_store import KeyStore
from pipeline.redis_server import RedisServer
from tests.batches.running import Batching, batching, text_line

KEYS = ("api.auth=required", "api.keys_refresh_s=0.1", "engine.mock.decode_base_ms=50", "batches.max_in_flight=4")


class Owned:
    """A Baton that wants keys, and what it knows of batches whose key opens nothing any more."""

    def __init__(self, it: Batching) -> None:
        self.it = it
        self.store = KeyStore(it.served.system.connection)
        self.records = BatchRecords(it.served.system.connection, lease_s=60, keep_s=60)

    async def key(self, name: str, **fields: Any) -> MadeKey:
        """A key that may be used from now on."""
        made = new_key(name, expires_in=None, **fields)
        await self.store.put(made.key)
        return made

    async def batch(self, key: MadeKey) -> str:
        """A batch of that key, whose lines take long."""
        async with openai.AsyncOpenAI(base_url=f"{self.it.served.url}/v1", api_key=key.secret) as client:
            as_owner = Batching(self.it.served, client)
            made = await as_owner.batch([text_line(str(number), max_tokens=2000) for number in range(6)])
            return str(made.id)

    async def state(self, batch_id: str) -> BatchRecord:
        found = await self.records.find(batch_id)
        assert found is not None
        return found

    async def until_ended(self, batch_id: str) -> BatchRecord:
        async def has_ended() -> bool:
            return (await self.state(batch_id)).has_ended

        await self.it.served.system.until(has_ended, 60)
        return await self.state(batch_id)


@pytest.fixture
async def owned(default_redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Owned]:
    async with batching(default_redis_server, tmp_path, *KEYS) as it:
        yield Owned(it)


async def test_a_batch_whose_key_is_revoked_is_cancelled(owned: Owned) -> None:
    served, key = owned.it.served, await owned.key("leaked")
    other = await owned.key("other")
    running = await owned.batch(key)
    await served.system.until(lambda: served.running(4), 60)
    await owned.store.put(msgspec.structs.replace(other.key, revoked_s=int(time.time())))
    await owned.store.put(msgspec.structs.replace(key.key, revoked_s=int(time.time())))
    ended = await owned.until_ended(running)
    assert (ended.state, ended.total, ended.owner) == ("cancelled", 6, key.key.id)
    await served.system.until(served.rests, 20)


async def test_a_batch_asks_for_the_models_of_its_key_alone(owned: Owned) -> None:
    batch_id = await owned.batch(await owned.key("narrow", models=("another",)))
    ended = await owned.until_ended(batch_id)
    assert ended.state == "failed" and "permission_denied" in ended.errors
