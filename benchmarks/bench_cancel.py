"""How long blocks stay taken after a client has gone: from the closed socket to the claim of the request that waited for them.

The decode worker's pool holds one request. A second one waits; the first one's client closes its connection. The wait ends when the
first one's blocks are free. Times are Redis TIME.

    python -m benchmarks.bench_cancel
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.table import Row, print_rows, quantile
from pipeline.redis_server import RedisServer
from tests.system import POOL, System, collect, request

ROUNDS = 20
SETTINGS = (
    "engine.mock.num_blocks=40", "engine.mock.max_num_batched_tokens=1024", "engine.mock.max_num_seqs=8",
    "engine.mock.decode_base_ms=10", "log.level=warning", "queue.overtake_ms=100000",
)  # fmt: skip
PROMPT_TOKENS = 330  # more than half of the pool


async def measure() -> list[Row]:
    """Milliseconds, p50 and worst."""
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with System(server.url, *SETTINGS) as system:
            await system.worker("prefill")
            await system.worker("decode")
            port = int((await system.api()).rsplit(":", 1)[1])
            times = [await one_round(system, port) for _ in range(ROUNDS)]
    return [
        Row("client gone to blocks free, p50", quantile(times, 0.5), "ms", 200.0),
        Row("client gone to blocks free, worst", max(times), "ms", 200.0),
    ]


async def one_round(system: System, port: int) -> float:
    """One client that leaves, and one request that waits for its blocks."""
    body = json.dumps({"model": POOL, "prompt": [3] * PROMPT_TOKENS, "max_tokens": 250, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await reader.readuntil(b"data: {")
    async with system.client() as client:
        waiting = await client.submit(request(PROMPT_TOKENS, max_tokens=2))
        await system.until(lambda: waits_for_decode(system, waiting.id))
        gone_us = await redis_time_us(system)
        writer.transport.abort()
        _, ended = await collect(waiting)
    return (ended.timeline.claimed_decode - gone_us) / 1000


async def waits_for_decode(system: System, request_id: str) -> bool:
    stage, state = await system.connection.command("HMGET", system.keys.request(request_id), "stage", "state")
    return bool((stage, state) == (b"decode", b"queued"))


async def redis_time_us(system: System) -> int:
    seconds, micros = await system.connection.command("TIME")
    return int(seconds) * 1_000_000 + int(micros)


def run() -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [row.as_dict() for row in asyncio.run(measure())]


if __name__ == "__main__":
    print_rows(run())
