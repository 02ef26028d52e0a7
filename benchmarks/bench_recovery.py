"""How long streams pause when their decode worker is killed (kill -9, nobody tells anybody) and another one has room.

Two decode workers, a lease of 5 s, 16 streams; again and again one worker is killed in the middle and a new one started. The pause of a
stream that the dead worker held is the time from the kill to its next token at the reader.

    python -m benchmarks recovery
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import Row, quantile
from pipeline.client import PoolClient
from pipeline.redis_server import RedisServer
from tests.system import System, request

LEASE_S, STREAMS, ROUNDS = 5.0, 16, 8
SETTINGS = (
    f"worker.lease_s={LEASE_S}", "engine.mock.decode_base_ms=20", "engine.mock.max_num_seqs=64", "log.level=warning",
)  # fmt: skip


class Watched:
    """One stream and when each of its tokens came."""

    def __init__(self, client: PoolClient) -> None:
        self.item = request(64, max_tokens=8000)
        self._client = client
        self.times_s: list[float] = []

    async def read(self) -> None:
        async with await self._client.submit(self.item) as stream:
            async for chunks in stream:
                self.times_s += [time.monotonic()] * sum(len(chunk.token_ids) for chunk in chunks)

    def next_after(self, moment_s: float) -> float | None:
        """When the first token after a moment came."""
        return next((at for at in self.times_s if at > moment_s), None)


async def measure() -> list[Row]:
    """Pauses in seconds; the reference is the lease."""
    pauses: list[float] = []
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with System(server.url, *SETTINGS) as system, system.client() as client:
            await system.worker("prefill")
            workers = [await system.worker("decode"), await system.worker("decode")]
            watched = [Watched(client) for _ in range(STREAMS)]
            reading = [asyncio.create_task(one.read()) for one in watched]
            for _ in range(ROUNDS):
                await asyncio.sleep(2)
                pauses += await kill_one(system, watched, workers.pop(0))
                workers.append(await system.worker("decode"))
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            for one in watched:
                with contextlib.suppress(Exception):
                    await client.queue.cancel(one.item.id, "measured")
    return [
        Row(f"kill -9 of a decode worker: pause of its streams, {label} of {len(pauses)}", quantile(pauses, share), "s", LEASE_S)
        for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    ]  # fmt: skip


async def kill_one(system: System, watched: list[Watched], worker: subprocess.Popen[bytes]) -> list[float]:
    """Kill a worker; returns the pauses of the streams that it held."""
    name = await name_of(system, worker)
    held = [one for one in watched if await owner(system, one) == name]
    killed_s = time.monotonic()
    worker.kill()
    await system.until(lambda: all(one.next_after(killed_s + 0.1) for one in held), 60)
    return [(one.next_after(killed_s + 0.1) or 0.0) - killed_s for one in held]


async def owner(system: System, one: Watched) -> str:
    value = await system.connection.command("HGET", system.keys.request(one.item.id), "owner")
    return (value or b"").decode()


async def name_of(system: System, worker: subprocess.Popen[bytes]) -> str:
    """Workers are named after their process id."""
    return next(name for name in await system.alive("decode") if f"-{worker.pid}-" in name)


def run() -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [row.as_dict() for row in asyncio.run(measure())]
