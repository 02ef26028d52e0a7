"""Batches: tokens per second alone, beside a closed-loop client that sends the same requests; and what live traffic and a batch are to
each other. The mock engine takes the time of a real model, so the processors are not the resource. Interleaved pairs, median of five.

    python -m benchmarks.bench_batches [PAIRS]
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.table import Row, print_rows, quantile
from pipeline.redis_server import RedisServer
from tests.system import POOL, System

SLOTS, PROMPT, ANSWER = 32, 200, 128
MODEL = (
    "engine.mock.prefill_base_ms=20", "engine.mock.prefill_token_ms=0.1", "engine.mock.decode_base_ms=40", "engine.mock.decode_seq_ms=0.2",
    f"engine.mock.max_num_seqs={SLOTS}", "log.level=warning", "transfer.verify=false", "batches.lease_s=5",
)  # fmt: skip
ALONE = 160  # requests of a batch alone
LIVE_S = 60.0  # of live traffic, measured behind a second of warming up
PATH = "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Live:
    """What live traffic saw: seconds to the first token, at the client and from admission to its log in Redis; tokens a second."""

    first_s: list[float]
    logged_s: list[float]
    tokens_s: float


def body(number: int, *, stream: bool) -> dict[str, Any]:
    """A request; no two begin alike."""
    rng = random.Random(number)
    asked = {
        "model": POOL,
        "prompt": [rng.randrange(3, 2000) for _ in range(PROMPT)],
        "max_tokens": ANSWER,
        "ignore_eos": True,
    }
    return asked | ({"stream": True} if stream else {})


async def closed_loop(http: httpx.AsyncClient, first: int, count: int) -> float:
    """Tokens a second of an ideal client: as many requests under way as keep all slots busy, no more."""
    numbers = iter(range(first, first + count))

    async def one() -> None:
        for number in numbers:
            answer = await http.post(PATH, json=body(number, stream=False))
            assert answer.status_code == 200, answer.text

    begin_s = time.monotonic()
    await asyncio.gather(*(one() for _ in range(SLOTS + SLOTS // 4)))
    return count * ANSWER / (time.monotonic() - begin_s)


async def submitted(http: httpx.AsyncClient, first: int, count: int) -> str:
    """A batch of these requests."""
    lines = (
        json.dumps({"custom_id": str(number), "method": "POST", "url": PATH, "body": body(number, stream=False)})
        for number in range(first, first + count)
    )
    form = {"file": ("in.jsonl", "\n".join(lines).encode()), "purpose": (None, "batch")}
    file = (await http.post("/v1/files", files=form)).json()
    asked = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "24h"}
    return str((await http.post("/v1/batches", json=asked)).json()["id"])


async def has_state(http: httpx.AsyncClient, batch_id: str, *states: str) -> None:
    """Returns when it is in one of them."""
    async with asyncio.timeout(300):
        while True:
            if (await http.get(f"/v1/batches/{batch_id}")).json()["status"] in states:
                return
            await asyncio.sleep(0.02)


async def alone(http: httpx.AsyncClient, first: int, count: int) -> float:
    """Tokens a second of a batch, from when it begins to when it ends."""
    batch_id = await submitted(http, first, count)
    await has_state(http, batch_id, "in_progress", "finalizing", "completed")
    begin_s = time.monotonic()
    await has_state(http, batch_id, "completed")
    return count * ANSWER / (time.monotonic() - begin_s)


async def live(http: httpx.AsyncClient, system: System, rate: float, seed: int) -> Live:
    """Streams that come at `rate`, whatever becomes of those before."""
    rng, first_s, ids = random.Random(seed), list[float](), list[str]()
    begin_s, tasks, at_s = time.monotonic(), list[asyncio.Task[None]](), 0.0

    async def one(number: int, *, counts: bool) -> None:
        asked_s = time.monotonic()
        async with http.stream("POST", PATH, json=body(number, stream=True)) as answer:
            if counts:
                ids.append(answer.headers["x-baton-request-id"])
            async for _ in answer.aiter_bytes():
                if counts:
                    first_s.append(time.monotonic() - asked_s)
                    counts = False

    while at_s < LIVE_S + 1:
        at_s += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(one(seed * 100_000 + len(tasks), counts=at_s > 1)))
    await asyncio.gather(*tasks)
    times = [("HMGET", system.keys.request(one), "t_admitted", "t_first_token") for one in ids]
    logged_s = [(int(first) - int(admitted)) / 1e6 for admitted, first in await system.connection.commands(*times)]
    return Live(first_s, logged_s, len(tasks) * ANSWER / (LIVE_S + 1))


async def beside(http: httpx.AsyncClient, system: System, rate: float, seed: int) -> tuple[Live, float]:
    """Live traffic with a batch that does not end meanwhile, and the batch's tokens a second."""
    batch_id = await submitted(http, seed * 1_000_000, 1000)
    await has_state(http, batch_id, "in_progress")
    await asyncio.sleep(3)
    begin, begin_s = await _done(system), time.monotonic()
    seen = await live(http, system, rate, seed)
    ended, seconds = await _done(system), time.monotonic() - begin_s
    await http.post(f"/v1/batches/{batch_id}/cancel")
    await has_state(http, batch_id, "cancelled")
    return seen, (ended - begin - len(seen.first_s)) * ANSWER / seconds


async def _done(system: System) -> int:
    return await system.counter("ended:done")


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[System, httpx.AsyncClient]]:
    """One of each process."""
    with RedisServer.start(folder) as server:
        server.wait_ready()
        async with System(server.url, *MODEL, log_dir=folder) as system:
            url, *_ = await asyncio.gather(system.api(), system.worker("prefill"), system.worker("decode"))
            system.spawn("workers", "batch")
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
                yield system, http


async def measure(pairs: int) -> list[Row]:
    """The figures."""
    batch, client, shares = list[float](), list[float](), list[float]()
    first, logged = list[tuple[float, float]](), list[tuple[float, float]]()  # p95 without and with a batch, ms
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder:
        async with running(Path(folder)) as (system, http):
            await alone(http, 0, 40)
            for pair in range(1, pairs + 1):
                client.append(await closed_loop(http, pair * 10_000, ALONE))
                batch.append(await alone(http, pair * 10_000 + 5000, ALONE))
            capacity = statistics.median(client)
            rate = capacity / ANSWER / 2
            for pair in range(1, pairs + 1):
                quiet = await live(http, system, rate, pair)
                busy, tokens_s = await beside(http, system, rate, pair + 100)
                first.append((p95_ms(quiet.first_s), p95_ms(busy.first_s)))
                logged.append((p95_ms(quiet.logged_s), p95_ms(busy.logged_s)))
                shares.append(tokens_s / (capacity - busy.tokens_s))
                print(pair, first[-1], logged[-1], f"{shares[-1]:.2f}", file=sys.stderr)
    return [
        Row("batch alone (closed-loop client)", statistics.median(batch), "tokens/s", capacity),
        beside_row("live TTFT p95 beside a batch (without)", first),
        beside_row("the same, from admission to the log", logged),
        Row("of what live traffic leaves, the batch gets", 100 * statistics.median(shares), "%", 100.0),
    ]


def p95_ms(seconds: list[float]) -> float:
    """Of some times."""
    return round(1000 * quantile(seconds, 0.95), 1)


def beside_row(name: str, pairs: list[tuple[float, float]]) -> Row:
    """The median pair by its ratio: what one run sees with a batch, beside what it sees without."""
    without, with_batch = sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]
    return Row(name, with_batch, "ms", without)


def run(pairs: int = 5) -> list[dict[str, Any]]:
    """For `python -m benchmarks batches`."""
    return [row.as_dict() for row in asyncio.run(measure(pairs))]


if __name__ == "__main__":
    print_rows(run(int(sys.argv[1]) if len(sys.argv) > 1 else 5), "batches")
