"""Tokens per second and CPU a token of the whole system: API, decode worker (parent and engine) and Redis, with an instant mock engine.

Streams are opened at once over HTTP and read by a process of its own that counts bytes. Beside it, in the same run: bare uvicorn +
sse-starlette that yields ready-made events of the same size to as many streams.

    python -m benchmarks.bench_system
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import Row, print_rows
from pipeline.redis_server import RedisServer
from tests.system import POOL, System, free_port

STREAMS = (1, 32, 128, 256)
TOKENS = {1: 2000, 32: 1000, 128: 500, 256: 300}  # a stream
INSTANT = (
    "engine.mock.prefill_base_ms=0", "engine.mock.prefill_token_ms=0", "engine.mock.decode_base_ms=0",
    "engine.mock.num_blocks=16384", "log.level=warning", "transfer.verify=false", "router.max_local_prefill_length=0",
)  # fmt: skip
EVENT = (
    b'data: {"id":"cmpl-baton-tiny-0123456789abcdefghijkl","object":"text_completion","created":1795345812,'
    b'"model":"baton-tiny","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
)


# -- load: a process that opens streams and counts ------------------------------------------------------------------------


def load(port: int, streams: int, tokens: int) -> tuple[int, float]:
    """Events received and seconds from the first event to the last, over all streams; runs in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (port, streams, tokens))


def _load(port: int, streams: int, tokens: int) -> tuple[int, float]:
    return asyncio.run(_all_streams(port, streams, tokens))


async def _all_streams(port: int, streams: int, tokens: int) -> tuple[int, float]:
    results = await asyncio.gather(*(_one_stream(port, tokens) for _ in range(streams)))
    return sum(events for events, _, _ in results), max(last for _, _, last in results) - min(
        first for _, first, _ in results
    )


async def _one_stream(port: int, tokens: int) -> tuple[int, float, float]:
    body = json.dumps(
        {"model": POOL, "prompt": [3] * 16, "max_tokens": tokens, "temperature": 0, "stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    events, first, last, tail = 0, 0.0, 0.0, b""
    while data := await reader.read(1 << 18):
        last = time.monotonic()
        first = first or last
        window = tail + data
        events += window.count(b"data: {")
        tail = window[-6:] if not window.endswith(b"data: {") else b""
    writer.close()
    return events, first, last


# -- bare uvicorn + sse-starlette -----------------------------------------------------------------------------------------


def serve_bare(port: int) -> None:
    """The reference: nothing but the framework."""
    import uvicorn
    from sse_starlette.sse import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Route

    async def stream(request: Request) -> EventSourceResponse:
        tokens = (await request.json())["max_tokens"]

        async def events() -> AsyncIterator[bytes]:
            for _ in range(tokens):
                yield EVENT

        return EventSourceResponse(events())

    app = Starlette(routes=[Route("/v1/completions", stream, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", loop="uvloop", http="httptools")


# -- measuring ------------------------------------------------------------------------------------------------------------


def cpu_s(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """CPU seconds of each part so far."""
    return {part: sum(sum(process.cpu_times()[:2]) for process in members) for part, members in processes.items()}


def memory_mib(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """Resident memory of each part, shared pages counted in each process that has them."""
    return {part: sum(process.memory_info().rss for process in members) / 2**20 for part, members in processes.items()}


async def measure() -> list[Row]:
    """Rows for every number of streams, then memory."""
    rows: list[Row] = []
    bare_port = free_port()
    bare = multiprocessing.get_context("spawn").Process(target=serve_bare, args=(bare_port,), daemon=True)
    bare.start()
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        async with System(server.url, *INSTANT) as system:
            prefill = await system.worker("prefill")
            decode = await system.worker("decode")
            url = await system.api()
            port = int(url.rsplit(":", 1)[1])
            api = system.processes[-1]
            parts = {
                "api": [psutil.Process(api.pid)],
                "decode worker": [psutil.Process(decode.pid)],
                "decode engine": psutil.Process(decode.pid).children(),
                "redis": [psutil.Process((await system.connection.command("INFO", "server"))["process_id"])],
            }
            await asyncio.to_thread(load, port, 4, 50)  # warm up both
            await asyncio.to_thread(load, bare_port, 4, 50)
            for streams in STREAMS:
                rows += await one_size(streams, port, bare_port, parts, psutil.Process(bare.pid))
            parts["prefill worker"] = [psutil.Process(prefill.pid)]
            parts["prefill engine"] = psutil.Process(prefill.pid).children()
            rows += [Row(f"memory of {part} afterwards", mib, "MiB") for part, mib in memory_mib(parts).items()]
    bare.terminate()
    bare.join()
    return rows


async def one_size(
    streams: int, port: int, bare_port: int, parts: dict[str, list[psutil.Process]], bare: psutil.Process
) -> list[Row]:
    """Baton and the bare server with the same number of streams and tokens."""
    tokens = TOKENS[streams]
    before = cpu_s(parts)
    events, seconds = await asyncio.to_thread(load, port, streams, tokens)
    after = cpu_s(parts)
    bare_before = sum(bare.cpu_times()[:2])
    bare_events, bare_seconds = await asyncio.to_thread(load, bare_port, streams, tokens)
    bare_cpu_us = (sum(bare.cpu_times()[:2]) - bare_before) / bare_events * 1e6
    total = streams * tokens
    label = f"{streams} streams"
    rows = [Row(f"{label}: tokens/s at the client", total / seconds, "tokens/s", bare_events / bare_seconds)]
    for part in parts:
        reference = bare_cpu_us if part == "api" else None
        rows.append(Row(f"{label}: CPU a token, {part}", (after[part] - before[part]) / total * 1e6, "us", reference))
    rows.append(Row(f"{label}: events a token", events / total, ""))
    return rows


def run() -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return [row.as_dict() for row in asyncio.run(measure())]


if __name__ == "__main__":
    print_rows(run())
