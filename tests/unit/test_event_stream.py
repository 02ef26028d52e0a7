"""Since when a client takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Message

from api.event_stream import EventStream


async def test_a_ping_does_not_hide_a_write_that_is_stuck() -> None:
    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    async def content() -> AsyncIterator[bytes]:
        yield b""

    stream = EventStream(content(), ping=b": ping\n\n", ping_s=1, send_timeout_s=1)
    sends: list[asyncio.Task[None]] = []
    seen: list[float] = []
    for body in (b"data: {}\n\n", b": ping\n\n"):
        sends.append(asyncio.create_task(stream._send_with_timeout(send, {"type": "http.response.body", "body": body})))
        await asyncio.sleep(0.01)  # the clock moves on
        seen.append(stream._sending_since_s)
    assert seen[0] == seen[1] > 0
    for task in sends:
        task.cancel()
    await asyncio.gather(*sends, return_exceptions=True)
