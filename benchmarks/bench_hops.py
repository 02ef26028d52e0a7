"""Empty-pipeline hop times with an instant mock engine, beside the same hops made bare on the same server in the same run.

Baton: submit -> admit -> claim (prefill process) -> engine child -> handover -> token bus -> reader; then claim (decode process) ->
fetch -> step -> token bus -> reader. Bare: XADD -> XREADGROUP in another process -> XADD -> XREADGROUP in a third -> PUBLISH -> reader.
Requests are sent one after another on an idle system, Baton and bare in turn.

    python -m benchmarks.bench_hops
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import Row, print_rows, quantile
from pipeline.client import PoolClient
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.redis_server import RedisServer
from tests.system import System, request

ROUNDS = 300
WARM_UP = 30
PROMPT_TOKENS = 64
INSTANT = (
    "engine.mock.prefill_base_ms=0",
    "engine.mock.prefill_token_ms=0",
    "engine.mock.decode_base_ms=0",
    "log.level=warning",
)


async def measure() -> list[Row]:
    """All rows; times in ms."""
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with System(server.url, *INSTANT, "transfer.verify=false") as system, BareHops(server.url) as bare:
            await system.worker("prefill")
            await system.worker("decode")
            async with system.client() as client:
                baton, hops = [], []
                for turn in range(WARM_UP + ROUNDS):
                    sample = await one_request(client)
                    single = await bare.round_trip()
                    if turn >= WARM_UP:
                        baton.append(sample)
                        hops.append(single)
    return rows(baton, hops)


async def one_request(client: PoolClient) -> dict[str, float]:
    """Times of one request: as its reader saw them, and between the steps of its life."""
    item = request(PROMPT_TOKENS, max_tokens=2)
    seen: list[float] = []
    start = time.perf_counter()
    stream = await client.submit(item)
    admitted = time.perf_counter()
    async with stream:
        async for chunks in stream:
            seen += [time.perf_counter()] * sum(len(chunk.token_ids) for chunk in chunks)
    assert stream.ended is not None
    t = stream.ended.timeline
    return {
        "submit to admitted": (admitted - start) * 1000,
        "admitted to claimed by prefill": (t.claimed_prefill - t.admitted) / 1000,
        "claimed to handed over (engine child, export)": (t.handover - t.claimed_prefill) / 1000,
        "handed over to claimed by decode": (t.claimed_decode - t.handover) / 1000,
        "claimed to fetched (engine child, copy)": (t.fetched - t.claimed_decode) / 1000,
        "submit to first token at the reader": (seen[0] - start) * 1000,
        "submit to second token at the reader": (seen[1] - start) * 1000,
    }


def rows(baton: list[dict[str, float]], bare: list[dict[str, float]]) -> list[Row]:
    """p50 and p99 of each hop; the reader's times beside the bare ones."""
    beside = {
        "submit to first token at the reader": "one hop and back",
        "submit to second token at the reader": "two hops and back",
    }
    out = []
    for name in baton[0]:
        times = [sample[name] for sample in baton]
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            reference = quantile([sample[beside[name]] for sample in bare], share) if name in beside else None
            out.append(Row(f"{name}, {label}", quantile(times, share), "ms", reference))
    return out


class BareHops:
    """The same hops without Baton: two processes that read groups, one subscriber."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection = Connection(RedisSettings(url=url))
        spawn = multiprocessing.get_context("spawn")
        self._processes = [
            spawn.Process(target=_relay, args=(url, "bare:1", "bare:2", "bare:one"), daemon=True),
            spawn.Process(target=_relay, args=(url, "bare:2", "", "bare:two"), daemon=True),
        ]

    async def __aenter__(self) -> BareHops:
        for stream in ("bare:1", "bare:2"):
            await self._connection.command("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM")
        self._subscription = await self._connection.subscribe("bare:one", "bare:two")
        self._messages = self._subscription.messages()
        for process in self._processes:
            process.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        await self._connection.close()

    async def round_trip(self) -> dict[str, float]:
        """ms from XADD to the first and to the second PUBLISH at the subscriber."""
        start = time.perf_counter()
        await self._connection.command("XADD", "bare:1", "*", "d", b"x" * 300)
        await anext(self._messages)
        first = time.perf_counter()
        await anext(self._messages)
        return {"one hop and back": (first - start) * 1000, "two hops and back": (time.perf_counter() - start) * 1000}


def _relay(url: str, source: str, target: str, channel: str) -> None:
    asyncio.run(_relay_loop(Connection(RedisSettings(url=url, timeout_s=3600)), source, target, channel))


async def _relay_loop(connection: Connection, source: str, target: str, channel: str) -> None:
    while True:
        reply: Any = await connection.command(
            "XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "BLOCK", 0, "STREAMS", source, ">"
        )
        entries = reply[0][1] if isinstance(reply, list) else next(iter(reply.values()))
        entry_id = entries[0][0]
        if target:
            await connection.commands(
                ("PUBLISH", channel, b"y"), ("XADD", target, "*", "d", b"x" * 300), ("XACK", source, "g", entry_id)
            )
        else:
            await connection.commands(("PUBLISH", channel, b"y"), ("XACK", source, "g", entry_id))


def run() -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [row.as_dict() for row in asyncio.run(measure())]


if __name__ == "__main__":
    print_rows(run())
