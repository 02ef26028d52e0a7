"""What a worker does with a task that it cannot read: bad bytes are dead-lettered, a newer version is left for a newer worker."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pipeline.protocol import WIRE_VERSION, Request
from tests.system import System, collect, request

LIMITS = (60, 60, 100, 100_000)  # deadline s, result ttl s, waiting tasks, waiting tokens


async def admit_raw(system: System, client_name: str, item: Request, body: bytes, version: int) -> None:
    """Admit bytes of the test's own choosing."""
    async with system.client(client_name) as client:
        deadline, ttl, tasks, tokens = LIMITS
        await client.queue._call(
            "admit", item.id, "prefill", "default", body, 4, 2, 1, version, client_name, deadline, ttl, tasks, tokens,
            "", "default",
        )  # fmt: skip


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
        await admit_raw(system, "raw", item, BAD[what], WIRE_VERSION)
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
        await admit_raw(system, "newer", item, b"what a later release writes", WIRE_VERSION + 1)
        async with system.client() as client:
            for _ in range(3):
                _, ended = await collect(await client.submit(request(4)))
                assert ended.state == "done"
            standing = await client.queue.attach(item.id, watch=False)
            assert standing is not None
            assert (standing.state, standing.stage) == ("queued", "prefill")
