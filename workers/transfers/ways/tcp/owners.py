"""The reader's side: connections to owners, kept for a while, so that a fetch need not begin with a handshake."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from workers.transfers.copies import CopyThreads
from workers.transfers.ways.tcp.address import look_up
from workers.transfers.ways.tcp.flow import Flow
from workers.transfers.ways.tcp.frames import HEAD_BYTES, Request, Status, read_head
from workers.transfers.ways.tcp.handshake import as_reader

RECEIVE_THREADS = 8
KEPT_S = 30.0  # an idle connection is used again so long; less than the owner keeps it
MAX_KEPT = 64  # idle connections to all owners; the ones that were idle longest go first

Address = tuple[str, int]


class Owner(NamedTuple):
    """A process that exports, as its handles tell of it."""

    host: str
    port: int
    key: bytes


class _Kept(NamedTuple):
    owner: Owner
    flow: Flow
    since_s: float


class Owners:
    """Asks owners for bytes."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = CopyThreads(RECEIVE_THREADS, "tcp-receive")
        self._kept: list[_Kept] = []  # the one that was idle longest first
        self._in_use: set[Flow] = set()
        self._closed = False

    @asynccontextmanager
    async def ask(self, owner: Owner, request: Request) -> AsyncIterator[tuple[Flow, Status]]:
        """A connection on which the owner has begun to answer, and how. Take all of the answer, or raise.

        Raises `OSError` where it cannot be reached or falls silent, `Stranger` where somebody else is there, `ValueError` where
        what it says is nothing.
        """
        flow, status = await self._asked(owner, request)
        try:
            yield flow, status
        except BaseException:
            self._end(flow)
            raise
        self._keep(owner, flow)

    async def close(self) -> None:
        """Hang up; what is being received fails. May be called twice."""
        self._closed = True
        for kept in self._kept:
            kept.flow.close()
        self._kept.clear()
        for flow in self._in_use:  # whoever uses it closes it
            flow.shut()
        await self._threads.close()

    async def _asked(self, owner: Owner, request: Request) -> tuple[Flow, Status]:
        while (flow := self._take_kept(owner)) is not None:
            try:
                return flow, await self._ask_over(flow, request)
            except ConnectionError:  # hung up since it was last used: nothing was asked
                continue
        flow = await self._connected(owner)
        return flow, await self._ask_over(flow, request)

    async def _ask_over(self, flow: Flow, request: Request) -> Status:
        try:
            await flow.write(request.pack())
            return read_head(await flow.read(HEAD_BYTES))
        except BaseException:
            self._end(flow)
            raise

    async def _connected(self, owner: Owner) -> Flow:
        """A new connection, both sides known to each other. No longer than `timeout_s` as a whole."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._connect(owner)
        except TimeoutError:
            raise TimeoutError(f"no connection within {self._timeout_s:g} s") from None

    async def _connect(self, owner: Owner) -> Flow:
        family, address = await _look_up(owner)
        flow = Flow(socket.socket(family, socket.SOCK_STREAM), self._threads, self._timeout_s)
        self._in_use.add(flow)
        try:
            if self._closed:
                raise ConnectionAbortedError("this transfer is closed")
            await flow.connect(address)
            await as_reader(flow, owner.key)
        except BaseException:
            self._end(flow)
            raise
        return flow

    def _take_kept(self, owner: Owner) -> Flow | None:
        """The connection to this owner that was used last. Those that were idle for too long end here."""
        oldest_s = time.monotonic() - KEPT_S
        while self._kept and self._kept[0].since_s < oldest_s:
            self._kept.pop(0).flow.close()
        for kept in reversed(self._kept):
            if kept.owner == owner:
                self._kept.remove(kept)
                self._in_use.add(kept.flow)
                return kept.flow
        return None

    def _keep(self, owner: Owner, flow: Flow) -> None:
        if self._closed:
            self._end(flow)
            return
        self._in_use.discard(flow)
        self._kept.append(_Kept(owner, flow, time.monotonic()))
        if len(self._kept) > MAX_KEPT:
            self._kept.pop(0).flow.close()

    def _end(self, flow: Flow) -> None:
        self._in_use.discard(flow)
        flow.close()


async def _look_up(owner: Owner) -> tuple[socket.AddressFamily, Address]:
    """An address itself is not looked up elsewhere: that would cost a thread."""
    try:
        return look_up(owner.host, owner.port, flags=socket.AI_NUMERICHOST)
    except OSError:
        return await asyncio.to_thread(look_up, owner.host, owner.port)
