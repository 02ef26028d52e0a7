"""What a worker does with a task that it cannot read: bad bytes are dead-lettered, a newer version is left for a newer worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.protocol import WIRE_VERSION, KVHandle, Request
from pipeline.queue import ENDED_STATES, Admission, Limits, PoolQueue
from tests.system import POOL, System, collect, request

LIMITS = Limits(max_waiting_tasks=10**6, max_waiting_tokens=10**9, deadline_s=20, result_ttl_s=60)


async def admit_raw(
    queue: PoolQueue, item: Request, body: bytes, version: int = WIRE_VERSION, stage: str = "prefill", delay_s: float = 0.0
) -> None:  # fmt: skip
    """Admit `item` with other bytes as its stored body."""
    admission = Admission(item, stage, "default", "fuzz", linger_s=0.0, delay_s=delay_s)
    arguments = list(queue._stored(admission, LIMITS))
    arguments[3], arguments[7] = body, version
    await queue._call("admit", *arguments, LIMITS.max_waiting_tasks, LIMITS.max_waiting_tokens, LIMITS.max_held)


BAD = {
    "not msgpack": b"\xc1\xff\x00",
    "another tag": msgspec.msgpack.encode({"type": "request.v0", "id": "x"}),
    "unknown field": msgspec.msgpack.encode({**msgspec.to_builtins(request(4)), "colour": "red"}),
    "wrong type": msgspec.msgpack.encode({**msgspec.to_builtins(request(4)), "created_s": "yesterday"}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", BAD)
async def test_bytes_that_are_no_task_are_dead_lettered_and_the_worker_goes_on(
    what: str, default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        item = request(4)
        await admit_raw(PoolQueue(system.connection, POOL), item, BAD[what])
        async with system.client() as client:

            async def is_dead() -> bool:
                standing = await client.queue.attach(item.id, watch=False)
                return standing is not None and standing.state == "dead"

            await system.until(is_dead, 20)
            [(_, letter)] = await system.connection.command("XRANGE", system.keys.dead(), "-", "+")
            fields = letter if isinstance(letter, dict) else dict(zip(letter[0::2], letter[1::2], strict=True))
            assert fields[b"id"] == item.id.encode()
            assert b"not readable" in fields[b"reason"]
            if what in ("unknown field", "wrong type"):
                assert b"$" in fields[b"reason"] or b"colour" in fields[b"reason"]  # where in the struct
            _, ended = await collect(await client.submit(request(4)))
            assert ended.state == "done"


async def test_a_newer_version_is_left_for_a_newer_worker_and_holds_nobody_up(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        item = request(4)
        await admit_raw(PoolQueue(system.connection, POOL), item, b"what a later release writes", WIRE_VERSION + 1)
        async with system.client() as client:
            for _ in range(3):
                _, ended = await collect(await client.submit(request(4)))
                assert ended.state == "done"
            standing = await client.queue.attach(item.id, watch=False)
            assert standing is not None
            assert (standing.state, standing.stage) == ("queued", "prefill")


def broken(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly `data`: cut, flipped, spliced, or of another shape altogether."""
    position = st.integers(0, len(data) - 1)
    flipped = st.tuples(position, st.integers(1, 255)).map(
        lambda at: data[: at[0]] + bytes([data[at[0]] ^ at[1]]) + data[at[0] + 1 :]
    )
    spliced = st.tuples(position, st.binary(max_size=8)).map(lambda at: data[: at[0]] + at[1] + data[at[0] :])
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
    trees = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    )
    return st.one_of(
        position.map(lambda end: data[:end]),
        flipped,
        spliced,
        st.binary(max_size=64),
        trees.map(msgspec.msgpack.encode),
    )


ITEM = request(4)
BODIES = broken(msgspec.msgpack.encode(ITEM))
HANDLES = broken(
    msgspec.msgpack.encode(
        KVHandle(
            id="h", request_id=ITEM.id, owner="nobody", transfer="shm", layout="x", num_tokens=4, num_blocks=1, nbytes=4096,
            params={"arena": "baton-x-1", "first": 0, "count": 1, "generation": 7},
        )
    )
)  # fmt: skip


@given(st.lists(BODIES, min_size=30, max_size=30), st.lists(HANDLES, min_size=30, max_size=30))
@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_no_bytes_on_the_wire_crash_a_worker(
    default_redis_url: str, tmp_path: Path, bodies: list[bytes], handles: list[bytes]
) -> None:
    """What can still be read is answered, everything else is dead-lettered (or fails by name where an engine cannot serve it)."""
    asyncio.run(admit_broken(default_redis_url, tmp_path, bodies, handles))


async def admit_broken(url: str, log_dir: Path, bodies: list[bytes], handles: list[bytes]) -> None:
    async with System(url, "worker.retry_backoff_s=0", log_dir=log_dir) as system:
        workers = [await system.worker("prefill"), await system.worker("decode")]
        queue = PoolQueue(system.connection, POOL)
        items = [request(4) for _ in (*bodies, *handles)]
        for item, body in zip(items, bodies, strict=False):
            await admit_raw(queue, item, body)
        for item, handle in zip(items[len(bodies) :], handles, strict=True):
            await admit_raw(queue, item, msgspec.msgpack.encode(item), stage="decode", delay_s=1)
            await system.connection.command("HSET", system.keys.request(item.id), "handle", handle)
        ends: dict[str, str] = {}

        async def all_ended() -> bool:
            for item, body in zip(items, [*bodies, *handles], strict=True):
                standing = await queue.attach(item.id, watch=False)
                if standing is not None and standing.state in ENDED_STATES:
                    ends[item.id] = f"{standing.state}: {standing.reason} ({body!r})"
            return len(ends) == len(items)

        await system.until(all_ended, 60)
        for item, body in zip(items, bodies, strict=False):
            if not readable(body):
                assert ends[item.id].startswith("dead: "), ends[item.id]
        assert [worker.poll() for worker in workers] == [None, None]
        async with system.client() as client:
            assert (await collect(await client.submit(request(4))))[1].state == "done"
        await system.until(system.rests, 20)


def readable(body: bytes) -> bool:
    try:
        msgspec.msgpack.decode(body, type=Request)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
