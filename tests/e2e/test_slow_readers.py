"""A client that stops reading costs a bounded buffer and nobody else anything; when it reads again it misses nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.redis_server import RedisServer
from tests.e2e.test_requests import long
from tests.e2e.test_resume import CHAT, by_choice, events, resume
from tests.serving import serving

pytestmark = pytest.mark.faults

READER = """
import pathlib, socket, sys
host, port, request, kept = sys.argv[1:]
client = socket.socket()
client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
client.connect((host, int(port)))
client.sendall(request.encode())
with pathlib.Path(kept).open("wb", buffering=0) as file:
    while data := client.recv(65536):
        file.write(data)
"""


async def test_a_client_that_is_stopped_delays_nobody(default_redis_server: RedisServer, tmp_path: Path) -> None:
    fast = ("engine.mock.decode_base_ms=0.2", "engine.mock.num_blocks=16384")
    bounded = ("api.stream_buffer_items=16", "api.send_timeout_s=300")
    async with serving(default_redis_server, tmp_path, *fast, *bounded) as served, served.http() as http:
        kept = tmp_path / "kept"
        host, port = served.url.removeprefix("http://").split(":")
        body = json.dumps(long(6000, n=4))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        head += f"x-baton-resumable: true\r\ncontent-length: {len(body)}\r\n\r\n"
        reader = subprocess.Popen([sys.executable, "-c", READER, host, port, head + body, str(kept)])
        try:
            await served.system.until(lambda: kept.exists() and b"data: " in kept.read_bytes())
            reader.send_signal(signal.SIGSTOP)
            request_id = header(kept.read_bytes(), b"x-baton-request-id")
            others = [http.post(CHAT, json=long(300)) for _ in range(8)]
            for answer in await asyncio.gather(*others):
                assert len(events(answer.content)) > 200
                assert answer.content.endswith(b"data: [DONE]\n\n")
            await served.system.until(lambda: served.system.logged(request_id, 6000))
            assert b"[DONE]" not in kept.read_bytes()  # it is stopped, and the server waits for it
            assert (await http.post(CHAT, json=long(50))).content.endswith(b"data: [DONE]\n\n")
            reader.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(reader.wait, 60) == 0
        finally:
            reader.kill()
            reader.wait()
        found = events(unchunked(kept.read_bytes()))
        assert by_choice(found) == by_choice(await resume(served.url, request_id))
        assert len({event.id for event in found}) == len(found)


def header(response: bytes, name: bytes) -> str:
    """A header of a raw response."""
    head = response.partition(b"\r\n\r\n")[0]
    return next(line.partition(b": ")[2].decode() for line in head.split(b"\r\n") if line.lower().startswith(name))


def unchunked(response: bytes) -> bytes:
    """The body of a raw response in HTTP's chunks."""
    at, parts = response.index(b"\r\n\r\n") + 4, []
    while at < len(response):
        line = response.index(b"\r\n", at)
        size = int(response[at:line], 16)
        parts.append(response[line + 2 : line + 2 + size])
        at = line + 4 + size
    return b"".join(parts)
