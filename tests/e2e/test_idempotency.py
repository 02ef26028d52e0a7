"""An idempotency key names one request: the same again is read, another is refused, one that came to nothing may run again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from pipeline.client import PoolClient
from pipeline.errors import IdempotencyConflict
from pipeline.protocol import Request
from pipeline.queue import Standing
from pipeline.stream import RequestStream
from tests.system import System, collect, request

KEY = {"idempotency_key": "key", "body_digest": "digest"}


@pytest.fixture
async def system(default_redis_url: str, tmp_path: Path) -> AsyncIterator[System]:
    async with System(default_redis_url, "engine.mock.decode_base_ms=15", log_dir=tmp_path) as system:
        yield system


async def start_workers(system: System) -> None:
    await asyncio.gather(system.worker("prefill"), system.worker("decode"))


async def submit(client: PoolClient, item: Request, digest: str = "digest") -> RequestStream:
    return await client.submit(item, idempotency_key="key", body_digest=digest)


async def test_the_same_key_reads_the_first_request_from_its_first_token_on_any_replica(system: System) -> None:
    await start_workers(system)
    async with system.client("api-a") as a, system.client("api-b") as b:
        first, second, third = (structs.replace(request(20, n=2, max_tokens=40), created_s=when) for when in (1, 2, 3))
        stream = await submit(a, first)
        reading = asyncio.create_task(collect(stream, 2))
        await system.until(lambda: system.logged(first.id, 3))
        again = await submit(b, second)
        assert (again.id, again.request, again.is_creator) == (first.id, first, False)
        answers = await asyncio.gather(reading, collect(again, 2))
        late = await submit(a, third)  # after the end: from the record
        assert late.request == first
        answers.append(await collect(late, 2))
        assert {str(tokens) for tokens, _ in answers} == {str(answers[0][0])}
        assert {ended.state for _, ended in answers} == {"done"}
        assert await system.counter("admitted") == 1
        await system.until(system.rests, 10)


async def test_another_body_is_refused_under_the_same_key(system: System) -> None:
    async with system.client() as client:
        first = request(20)
        async with await submit(client, first) as stream:
            with pytest.raises(IdempotencyConflict, match=first.id):
                await submit(client, request(20), "another")
            await stream.cancel("test")
        with pytest.raises(IdempotencyConflict, match=first.id):
            await submit(client, request(20), "another")
        assert await system.counter("admitted") == 1


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired", "dead"])
async def test_what_came_to_nothing_may_run_again_and_the_key_names_the_new_one(system: System, state: str) -> None:
    async with system.client() as client:
        first, second = request(20), request(20)
        async with await submit(client, first):
            await client.queue.end(first.id, state, "test")
        async with await submit(client, second) as stream:
            assert (stream.id, stream.is_creator) == (second.id, True)
            assert await system.connection.command("TTL", system.keys.root + "idem:key") == -1
            async with await submit(client, request(20)) as third:
                assert third.id == second.id
            await stream.cancel("test")
        await system.until(system.rests, 10)


async def test_the_one_that_created_a_request_decides_and_others_only_look_on(system: System) -> None:
    async with system.client() as client:
        first = request(20)
        async with await submit(client, first) as stream:
            async with await submit(client, request(20)) as looking_on:
                await looking_on.leave("looked enough")
            assert (await standing(client, first.id)).state == "queued"
            await stream.leave("creator left")
        assert (await standing(client, first.id)).state == "cancelled"


async def test_a_request_that_lingers_is_due_from_the_last_reader_on(system: System) -> None:
    async with system.client("api-a") as a, system.client("api-b") as b:
        item = request(20)
        due = lambda: system.connection.command("ZSCORE", system.keys.orphans(), item.id)  # noqa: E731
        async with await a.submit(item, linger_s=60) as stream:
            await stream.leave("creator left")
        assert await due() is not None
        found = await b.find(item.id)
        assert found is not None
        assert found.linger_s == 60
        async with await b.attach(item.id, found=found) as reader:
            await system.until(lambda: is_none(due()), 10)
            async with await a.attach(item.id, found=found) as other:
                await other.leave("one of two left")
            await system.until(lambda: is_none(due()), 10)  # the other one still reads
            await reader.leave("the last left")
        assert await due() is not None
        await a.queue.cancel(item.id, "test")
        assert await due() is None


async def is_none(asked: object) -> bool:
    return await asked is None  # type: ignore[misc]


async def standing(client: PoolClient, request_id: str) -> Standing:
    found = await client.find(request_id)
    assert found is not None
    return found
