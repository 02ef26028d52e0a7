"""A cable between two TCP sockets that a test can pull out, or hold on to: a proxy of its own for each thing that networks do.

async with Cable(port) as cable:
    cable.hold_after(1_000_000)  # bytes towards the reader, all connections together; then nothing passes either way
    ...                          # connect to cable.port
    await cable.held.wait()
    cable.cut()                  # both ends are closed; or cable.let_go()
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

CHUNK_BYTES = 65_536


class Cable:
    """Listens on a port of its own and passes everything on to `port` of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.connections = 0  # so far
        self.held = asyncio.Event()
        self.flip_at: int | None = (
            None  # the byte towards the reader that changes on its way, of all connections together
        )
        self._to = port
        self._passed = 0
        self._limit: int | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._lines, return_exceptions=True)

    @property
    def open_lines(self) -> int:
        """Connections that neither side has closed."""
        return len(self._lines)

    def hold_after(self, nbytes: int) -> None:
        """Once so many more bytes have come from the owner nothing passes any more, and nobody is told."""
        self.held.clear()
        self._limit = self._passed + nbytes

    def let_go(self) -> None:
        """What was held goes on its way."""
        self._limit = None
        self._free.set()

    def cut(self) -> None:
        """Close every connection. New ones pass."""
        for line in self._lines:
            line.cancel()

    def cut_one(self) -> None:
        """Close one of the connections."""
        next(iter(self._lines)).cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        self.connections += 1
        ends = [writer]
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                up_reader, up = await self._connect()
                ends.append(up)
                await self._pass_both(reader, up, up_reader, writer)
        finally:
            self._lines.discard(line)
            for end in ends:
                end.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """With little room for what comes: what is held back stays with its sender."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
        sock.connect(("127.0.0.1", self._to))
        return await asyncio.open_connection(sock=sock, limit=CHUNK_BYTES)

    async def _pass_both(
        self, reader: asyncio.StreamReader, up: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        ways = [asyncio.create_task(self._up(reader, up)), asyncio.create_task(self._down(up_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._free.wait()
            up.write(data)
            await up.drain()

    async def _down(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await up_reader.read(CHUNK_BYTES):
            if self._limit is not None and self._passed + len(data) > self._limit:
                allowed = max(0, self._limit - self._passed)
                await self._send(writer, data[:allowed])
                data = data[allowed:]
                self._free.clear()
                self.held.set()
            await self._free.wait()
            await self._send(writer, data)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if self.flip_at is not None and self._passed <= self.flip_at < self._passed + len(data):
            at = self.flip_at - self._passed
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        self._passed += len(data)
        writer.write(data)
        await writer.drain()
