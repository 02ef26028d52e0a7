"""The Redis under test: a private one that may end and come back, with all of its data or without the last of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from pipeline.redis_server import RedisServer

LOST_S = 0.7  # of its data, when its power is cut


class Server:
    """Use as `async with Server(folder)`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.power_cuts_s: list[float] = []  # when it was back with less than it had said

    async def __aenter__(self) -> Server:
        await self._start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._server.stop)

    @property
    def url(self) -> str:
        """Where it listens, always."""
        return self._server.url

    @property
    def socket_path(self) -> Path:
        """The same as a path."""
        return self._server.socket_path

    async def command(self, *words: str) -> None:
        """One command, on a connection of its own. Raises `RedisUnavailable`."""
        await asyncio.to_thread(self._server.command, *words)

    async def restart(self, number: signal.Signals) -> None:
        """End it by a signal and start it again on the same data."""
        await self._end(number)
        await self._start()

    async def cut_power(self) -> None:
        """Kill it and start it on the data of most of a second ago: what `appendfsync everysec` may lose."""
        path = max((self._folder / "redis").rglob("*.aof"), key=lambda file: file.stat().st_mtime)
        length = path.stat().st_size
        await asyncio.sleep(LOST_S)
        await self._end(signal.SIGKILL)
        os.truncate(path, min(length, path.stat().st_size))
        await self._start()
        self.power_cuts_s.append(time.monotonic())

    async def _start(self) -> None:
        self._server = RedisServer.start(self._folder, appendfsync="everysec")
        await asyncio.to_thread(self._server.wait_ready)

    async def _end(self, number: signal.Signals) -> None:
        self._server.process.send_signal(number)
        await asyncio.to_thread(self._server.process.wait)
        self._server.stop()  # it has ended: this frees the folder
