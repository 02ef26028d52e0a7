"""A proxy between a process and Redis. It can lose a reply (the command is carried out, the line is cut before the answer) and hold
a command back."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from pathlib import Path


class LossyProxy:
    """Listens on a unix socket; `lose_next_reply` cuts the line once, behind the next command that contains `needle`."""

    def __init__(self, redis_socket: str, folder: Path) -> None:
        self._upstream = redis_socket
        self._path = folder / f"{uuid.uuid4().hex[:8]}.sock"
        self._needle: bytes | None = None
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self.lost = 0
        self._hold: bytes | None = None
        self.holds = asyncio.Event()  # a command is held back
        self._let_go = asyncio.Event()

    @property
    def url(self) -> str:
        """Where a client connects."""
        return f"unix://{self._path}"

    async def __aenter__(self) -> LossyProxy:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def lose_next_reply(self, needle: bytes) -> None:
        """Arm the proxy."""
        self._needle = needle

    def hold_next(self, needle: bytes) -> None:
        """Keep the next command that contains `needle` from Redis until `let_go`."""
        self._hold = needle

    def let_go(self) -> None:
        """Pass on what is held back."""
        self._let_go.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        cut = asyncio.Event()
        forward = asyncio.create_task(self._forward(reader, up_writer, cut))
        back = asyncio.create_task(self._back(up_reader, writer, cut))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([forward, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pipe in (forward, back):
                pipe.cancel()
            for end in (writer, up_writer):
                end.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await end.wait_closed()
            self._pipes.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        while data := await reader.read(1 << 20):
            if self._needle is not None and self._needle in data:
                self._needle = None
                cut.set()
            if self._hold is not None and self._hold in data:
                self._hold = None
                self.holds.set()
                await self._let_go.wait()
            up.write(data)
            await up.drain()

    async def _back(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        while data := await up.read(1 << 20):
            if cut.is_set():  # Redis has answered, so the command was carried out
                self.lost += 1
                return
            writer.write(data)
            await writer.drain()
