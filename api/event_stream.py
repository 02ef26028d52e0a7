"""sse-starlette's response, with the settings that OpenAI clients need and a send time-out that costs nothing a token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Message, Send


class EventStream(EventSourceResponse):
    """Writes `content`, ready bytes, and `ping` each `ping_s`. Raises SendTimeoutError when the client takes nothing for
    `send_timeout_s` (to a quarter more).

    The library makes a cancel scope for each send, which costs a fifth of a streamed token; here one watcher a stream looks at a time.
    """

    def __init__(self, content: AsyncIterator[bytes], *, ping: bytes, ping_s: float, send_timeout_s: float) -> None:
        super().__init__(
            content,
            sep="\n",
            ping=ping_s,
            ping_message_factory=lambda: ping,  # type: ignore[arg-type,return-value]  # bytes are passed on as they are
            data_sender_callable=self._watch_sends,
        )
        self._send_timeout_s = send_timeout_s
        self._sending_since_s = 0.0

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        self._sending_since_s = self._sending_since_s or time.monotonic()  # a ping does not hide a write that is stuck
        await send(message)
        self._sending_since_s = 0.0

    async def _watch_sends(self) -> None:
        while True:
            await asyncio.sleep(self._send_timeout_s / 4)
            if self._sending_since_s and time.monotonic() - self._sending_since_s > self._send_timeout_s:
                raise SendTimeoutError
