"""Just enough of HTTP/1.1 for a client that costs next to nothing: one request a connection, answers in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

REQUEST_ID = b"x-baton-request-id:"


class Exchange:
    """One request; iterate its answer for chunks of the body."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.request_id = ""

    async def post(self, body: bytes) -> AsyncIterator[bytes]:
        """The chunks of the answer. Raises RuntimeError with the body of an answer that is none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        try:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            lowered = answer.lower()
            if b"transfer-encoding: chunked" not in lowered or b" 200 " not in answer[:20]:
                raise RuntimeError((answer + await reader.read(2000)).decode(errors="replace"))
            for line in lowered.split(b"\r\n"):
                if line.startswith(REQUEST_ID):
                    at = lowered.index(line)  # the id itself keeps its case
                    self.request_id = answer[at + len(REQUEST_ID) : at + len(line)].decode().strip()
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
        finally:
            writer.close()


async def is_ready(port: int, path: str = "/ready") -> bool:
    """Whether a server answers 200."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return b" 200 " in (await reader.readline())
    finally:
        writer.close()
