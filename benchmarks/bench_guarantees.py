"""What the guarantees cost: the same streams through a decode worker as it is, and through one whose step script has neither fence,
deadline nor log (`benchmarks/bare_worker.py`). Both workers live in one system; each has its turn, five times.

    python -m benchmarks guarantees
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import Row
from pipeline.client import PoolClient
from pipeline.redis_server import RedisServer
from tests.system import System, request

STREAMS, TOKENS, ROUNDS = 128, 300, 5
INSTANT = (
    "engine.mock.prefill_base_ms=0", "engine.mock.prefill_token_ms=0", "engine.mock.decode_base_ms=0",
    "engine.mock.num_blocks=16384", "log.level=warning", "transfer.verify=false", "worker.lease_s=600",
)  # fmt: skip
KINDS = {"as it is": "workers", "bare": "benchmarks.bare_worker"}


async def measure() -> list[Row]:
    """Tokens a second and Redis's CPU a token of both, medians."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    redis_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with System(server.url, *INSTANT) as system, system.client() as client:
            await system.worker("prefill")
            redis = psutil.Process((await system.connection.command("INFO", "server"))["process_id"])
            for turn in range(ROUNDS + 1):
                for kind, module in KINDS.items():
                    worker = await start(system, module)
                    before = sum(redis.cpu_times()[:2])
                    rate = await tokens_per_s(client)
                    used_us = (sum(redis.cpu_times()[:2]) - before) / (STREAMS * TOKENS) * 1e6
                    worker.send_signal(signal.SIGTERM)
                    await asyncio.to_thread(worker.wait)
                    if turn:  # the first is a warm-up
                        rates[kind].append(rate)
                        redis_us[kind].append(used_us)
    whole, bare = (statistics.median(rates[kind]) for kind in KINDS)
    whole_us, bare_us = (statistics.median(redis_us[kind]) for kind in KINDS)
    return [
        Row(f"{STREAMS} streams: tokens/s, beside no fence and no log", whole, "tokens/s", bare),
        Row(f"{STREAMS} streams: Redis CPU a token, beside no fence and no log", whole_us, "us", bare_us),
    ]


async def start(system: System, module: str) -> subprocess.Popen[bytes]:
    """The only decode worker, of one kind."""
    process = system.spawn(module, "decode")

    async def is_alive() -> bool:
        return len(await system.alive("decode")) == 1

    await system.until(is_alive)
    return process


async def tokens_per_s(client: PoolClient) -> float:
    """All streams at once, from the first token to the last end."""
    streams = [await client.submit(request(16, max_tokens=TOKENS)) for _ in range(STREAMS)]
    began_s = time.perf_counter()
    await asyncio.gather(*(read(stream) for stream in streams))
    return STREAMS * TOKENS / (time.perf_counter() - began_s)


async def read(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            pass


def run() -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [row.as_dict() for row in asyncio.run(measure())]
