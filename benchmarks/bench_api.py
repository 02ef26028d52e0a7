"""The API half of a stream: the real application over a token source at the client's seam, beside bare uvicorn + sse-starlette.

`python -m benchmarks.bench_api`. Each server is a process of its own; CPU is that process's own time from the first token to the
last byte. The source is what the bus is: it decodes one frame a step for all streams and feeds the real `RequestStream`s.

- `CPU a token`: 128 streams, one step each 20 ms, each token an event and a write of its own. References of the same run:
  a bare app that wakes each stream at the same steps and yields a ready-made event, and one that yields them without waiting.
- `saturation`: more tokens are due than one process can write; those that queued up leave together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import uvicorn
import uvloop
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.__main__ import http_config, listen
from api.app import create_app
from benchmarks.table import Row, print_rows
from pipeline.config import ApiSettings, LogSettings
from pipeline.logs import configure
from pipeline.pools import ServedPool
from pipeline.preprocess import Preprocessor
from pipeline.protocol import (
    BackendInput,
    EndItem,
    FrameItem,
    Request,
    SamplingOptions,
    StopConditions,
    Timeline,
    TokenItem,
)
from pipeline.snapshot import PoolSnapshot
from pipeline.stream import RequestStream
from pipeline.surface.feed import Piece
from pipeline.surface.shapes.openai import OpenAIEvents
from tests import texts

STREAMS = 128
TICK_S = 0.02
PACED_TOKENS = 200  # a stream
FLOOD_TOKENS = 2000  # a stream
FLOOD_PER_S = 150_000  # tokens that come in a second, more than one process can write
SATURATION_PER_S = 40_000
RUNS = 3
POOL = "bench"
SETTINGS = ApiSettings(ping_s=15.0)


# -- servers ----------------------------------------------------------------------------------------------------------


class Clock:
    """Opens when all streams are there, then says at each step how many steps are due."""

    def __init__(self, streams: int, steps: int, step_s: float) -> None:
        self._missing = streams
        self._steps = steps
        self._step_s = step_s
        self._open = asyncio.Event()
        self.cpu_s = 0.0
        self.begin_s = 0.0

    def arrive(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._open.set()

    async def run(self, step: Callable[[int], None]) -> None:
        await self._open.wait()
        await asyncio.sleep(0.2)
        self.cpu_s, self.begin_s = time.process_time(), time.monotonic()
        for number in range(self._steps):
            due_s = self.begin_s + number * self._step_s
            late_s = time.monotonic() - due_s
            if late_s < 0:
                await asyncio.sleep(-late_s)
            elif number % 16 == 0:
                await asyncio.sleep(0)  # as a reader of a socket that always has data: many frames, then the others
            step(number)

    async def stats(self, request: HttpRequest) -> Response:
        return JSONResponse({"cpu_s": time.process_time() - self.cpu_s, "wall_s": time.monotonic() - self.begin_s})


def token_ids(count: int) -> list[int]:
    text = " ".join(texts.HARD_TEXTS[:1] * 40)
    ids = texts.tokenizer("byte_level").encode(text, add_special_tokens=False)
    return (ids * (count // len(ids) + 1))[:count]


class SourceClient:
    """At `PoolClient`'s seam: admits everything and feeds all streams from frames, as the bus reader does."""

    redis_error = None

    def __init__(self, clock: Clock, tokens: int) -> None:
        self._clock = clock
        self._tokens = [token_id.to_bytes(4, "little") for token_id in token_ids(tokens)]
        self._streams: dict[str, RequestStream] = {}
        self._frames: list[bytes] = []
        self._decode = msgspec.msgpack.Decoder(list[FrameItem]).decode

    async def submit(self, request: Request, **_: object) -> RequestStream:
        async def nothing(*_: object) -> None:
            return None

        stream = RequestStream(
            request.id,
            1,
            buffer_items=10**9,
            patience_s=60.0,
            read=nothing,
            cancel=nothing,
            forget=nothing,
            linger=nothing,
            request=request,
        )
        self._streams[request.id] = stream
        self._clock.arrive()
        return stream

    async def snapshot(self) -> PoolSnapshot:
        return PoolSnapshot()

    def step(self, number: int) -> None:
        """What arrives in one step: a frame with a token of each stream."""
        is_last = number == len(self._tokens) - 1
        token, encode = self._tokens[number], msgspec.msgpack.Encoder().encode
        reason = "length" if is_last else ""
        frame = encode([TokenItem(request_id, 0, number, token, reason) for request_id in self._streams])
        for item in self._decode(frame):
            if isinstance(item, TokenItem):
                self._streams[item.id].feed(item)
        if is_last:
            for request_id, stream in self._streams.items():
                stream.feed_end(EndItem(request_id, "done", "", 5, len(self._tokens), 0, "decode", Timeline()))


def baton_app(clock: Clock, tokens: int) -> tuple[Any, Callable[[int], None]]:
    client = SourceClient(clock, tokens)
    preprocessor = Preprocessor(
        texts.tokenizer("byte_level"), model=POOL, max_model_len=1_000_000, default_max_tokens=tokens, max_choices=1
    )
    app = create_app(SETTINGS, {POOL: ServedPool(POOL, preprocessor, client, 0)})  # type: ignore[arg-type]
    app.add_route("/stats", clock.stats)
    return app, client.step


def bare_app(clock: Clock, tokens: int, *, is_paced: bool) -> tuple[Any, Callable[[int], None]]:
    body = BackendInput(
        request_id="x", model=POOL, token_ids=[1], stop_conditions=StopConditions(), sampling_options=SamplingOptions()
    )
    request = Request(id="bench-" + "x" * 22, kind="chat.completion", created_s=0, input=body)
    event = OpenAIEvents(request, "reasoning_content", (), request, 0).piece(Piece(0, " quick", (), None), None, 1)
    loop = asyncio.get_event_loop()
    waiters: list[asyncio.Future[None]] = []
    come = 0

    async def write() -> AsyncIterator[bytes]:
        for sent in range(tokens):
            while sent >= (come if is_paced else come * tokens):
                waiters.append(waiter := loop.create_future())
                await waiter
            yield event
        yield b"data: [DONE]\n\n"

    async def stream(request: HttpRequest) -> Response:
        await request.body()
        clock.arrive()
        return EventSourceResponse(write(), sep="\n", ping=SETTINGS.ping_s, send_timeout=SETTINGS.send_timeout_s)

    def step(number: int) -> None:
        nonlocal come
        come = number + 1
        for waiter in waiters:
            waiter.set_result(None)
        waiters.clear()

    routes = [Route("/v1/chat/completions", stream, methods=["POST"]), Route("/stats", clock.stats)]
    return Starlette(routes=routes), step


async def serve(kind: str, port: int, tokens: int, step_s: float) -> None:
    configure(LogSettings(format="json"), "bench")  # one line a request, as in service
    clock = Clock(STREAMS, tokens, step_s)
    app, step = baton_app(clock, tokens) if kind == "baton" else bare_app(clock, tokens, is_paced=kind == "bare")
    server = uvicorn.Server(http_config(app, SETTINGS))
    running = asyncio.create_task(clock.run(step))
    await server.serve(sockets=[listen("127.0.0.1", port)])
    running.cancel()


# -- client -----------------------------------------------------------------------------------------------------------


class Reader(asyncio.Protocol):
    """One stream: sends the request, counts bytes until the end."""

    def __init__(self, done: asyncio.Future[int]) -> None:
        self._done = done
        self._bytes = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = json.dumps({"model": POOL, "messages": [{"role": "user", "content": "go"}], "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        self._tail = (self._tail + data)[-32:]
        if b"[DONE]" in self._tail and not self._done.done():
            self._done.set_result(self._bytes)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("the stream was cut"))


async def load(port: int) -> tuple[int, dict[str, float]]:
    """Read all streams to their end; returns bytes and what the server says of itself."""
    loop = asyncio.get_running_loop()
    readers = [loop.create_future() for _ in range(STREAMS)]
    transports = [
        (await loop.create_connection(lambda done=done: Reader(done), "127.0.0.1", port))[0] for done in readers
    ]
    total = sum(await asyncio.gather(*readers))
    stats = await _get_stats(port)
    for transport in transports:
        transport.close()
    return total, stats


async def _get_stats(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def measure(kind: str, tokens: int, step_s: float) -> tuple[int, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.bench_api", "--serve", kind, str(port), str(tokens), str(step_s)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        _wait_open(port, process)
        return uvloop.run(load(port))
    finally:
        process.terminate()
        process.wait(20)


def _wait_open(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server ended with {process.returncode}")


def run() -> list[dict[str, Any]]:
    """One row a figure: {name, value, unit, reference, ratio}; the best of some runs each, taken in turn."""
    cpu_us: dict[str, list[float]] = {"baton": [], "bare": [], "eager": []}
    for _ in range(RUNS):
        for kind, rows in cpu_us.items():
            _, stats = measure(kind, PACED_TOKENS, TICK_S)
            rows.append(stats["cpu_s"] / (STREAMS * PACED_TOKENS) * 1e6)
    baton, bare, eager = (min(rows) for rows in cpu_us.values())
    flood = [measure("baton", FLOOD_TOKENS, STREAMS / FLOOD_PER_S) for _ in range(RUNS)]
    per_s = max(STREAMS * FLOOD_TOKENS / stats["wall_s"] for _, stats in flood)
    flood_us = min(stats["cpu_s"] for _, stats in flood) / (STREAMS * FLOOD_TOKENS) * 1e6
    rows = [
        Row("CPU a token, 128 streams, beside bare at the same steps", baton, "us", bare),
        Row("CPU a token, 128 streams, beside bare without waiting", baton, "us", eager),
        Row("saturation of one process, beside the design's least", per_s, "tokens/s", SATURATION_PER_S),
        Row("CPU a token at saturation", flood_us, "us"),
    ]
    return [row.as_dict() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=4, metavar=("KIND", "PORT", "TOKENS", "STEP_S"), help="internal: be a server")
    arguments = parser.parse_args()
    if arguments.serve:
        kind, port, tokens, step_s = arguments.serve
        uvloop.run(serve(kind, int(port), int(tokens), float(step_s)))
        return
    print_rows(run())


if __name__ == "__main__":
    main()
