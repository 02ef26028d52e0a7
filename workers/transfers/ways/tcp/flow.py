"""A connection whose every wait has a limit, and whose long copies leave the event loop free.

Bytes of blocks are moved by threads for as long as they flow. Where they stall for a moment the thread is given back and the
loop waits for the socket: a peer that hangs holds no thread, and many of them cannot keep those that flow from theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import socket
from collections.abc import AsyncIterator, Callable

import xxhash

from workers.transfers.copies import CopyThreads

INLINE_BYTES = 524_288  # moved by the loop itself: less work than the hop to a thread and back
CHUNK_BYTES = 1_048_576  # of one system call, so that what it moved is still in the cache when it is digested
WAKE_BYTES = 524_288  # to be woken for every segment of 64 KiB costs as much as the copies
PATIENCE_MS = 20  # a thread waits so long for a socket before the loop does

Pump = Callable[
    [int], int
]  # moves what it can, waiting so many milliseconds at most for each piece; returns bytes moved


class Flow:
    """A stream socket, which it owns. Everything raises `OSError` where the connection ends or nothing moves for `timeout_s`."""

    def __init__(self, sock: socket.socket, threads: CopyThreads, timeout_s: float) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._threads = threads
        self._timeout_s = timeout_s

    async def connect(self, address: tuple[str, int]) -> None:
        """Connect to an address that needs no looking up."""
        async with self._limit():
            await asyncio.get_running_loop().sock_connect(self._socket, address)

    async def read(self, nbytes: int, *, timeout_s: float | None = None) -> bytes:
        """Exactly so many bytes; few."""
        data = b""
        while len(data) < nbytes:
            async with self._limit(timeout_s):
                part = await asyncio.get_running_loop().sock_recv(self._socket, nbytes - len(data))
            if not part:
                raise ConnectionResetError("the other side closed the connection")
            data += part
        return data

    async def write(self, data: bytes) -> None:
        """All of the bytes; few."""
        async with self._limit():
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self, into: memoryview) -> bytes:
        """Fill `into`; returns the xxh3-128 of what came."""
        digest = xxhash.xxh3_128()
        await self._move(
            len(into), lambda at: functools.partial(_receive, self._socket, into[at:], digest), writes=False
        )
        return digest.digest()

    async def send_file(self, fd: int, offset: int, data: memoryview) -> bytes:
        """Send a part of a file straight from its pages; `data` is a mapping of that part. Returns its xxh3-128.

        The pages are not copied: they may be on their way for a while after this returns, and change there.
        """
        digest = xxhash.xxh3_128()
        await self._move(
            len(data),
            lambda at: functools.partial(_send, self._socket, fd, offset + at, data[at:], digest),
            writes=True,
        )
        return digest.digest()

    def shut(self) -> None:
        """End the connection; what waits for it or moves its bytes in a thread ends with an error."""
        with contextlib.suppress(OSError):  # it was never connected, or has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. Nothing may move its bytes any more."""
        self._socket.close()

    async def _move(self, nbytes: int, pump_from: Callable[[int], Pump], *, writes: bool) -> None:
        at = 0
        while at < nbytes:
            pump = pump_from(at)
            if nbytes - at <= INLINE_BYTES:
                at += pump(0)
            else:
                at += await self._threads.run(functools.partial(pump, PATIENCE_MS), stop=self.shut)
            if at < nbytes:
                await self._ready(writes=writes)

    async def _ready(self, *, writes: bool) -> None:
        """Wait until the socket can be read, or written."""
        loop = asyncio.get_running_loop()
        add, remove = (loop.add_writer, loop.remove_writer) if writes else (loop.add_reader, loop.remove_reader)
        ready = asyncio.Event()
        add(self._socket, ready.set)
        try:
            async with self._limit():
                await ready.wait()
        finally:
            remove(self._socket)

    @contextlib.asynccontextmanager
    async def _limit(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise TimeoutError(f"nothing moved for {limit_s:g} s") from None


def _receive(sock: socket.socket, into: memoryview, digest: xxhash.xxh3_128, patience_ms: int) -> int:
    """Take what comes until `into` is full or nothing comes for a moment."""
    done = 0
    try:
        while done < len(into):
            try:
                count = sock.recv_into(into[done : done + CHUNK_BYTES])
            except BlockingIOError:
                _wake_from(sock, min(WAKE_BYTES, len(into) - done))
                if not _becomes(sock, select.POLLIN, patience_ms):
                    break
                continue
            if not count:
                raise ConnectionResetError("the other side closed the connection")
            digest.update(into[done : done + count])
            done += count
    finally:
        _wake_from(sock, 1)
    return done


def _wake_from(sock: socket.socket, nbytes: int) -> None:
    """Let the socket become readable with so many bytes, not before, unless it ends."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


def _send(
    sock: socket.socket, fd: int, offset: int, data: memoryview, digest: xxhash.xxh3_128, patience_ms: int
) -> int:
    """Send until all is sent or nothing is taken for a moment."""
    done = 0
    while done < len(data):
        try:
            count = os.sendfile(sock.fileno(), fd, offset + done, min(CHUNK_BYTES, len(data) - done))
        except BlockingIOError:
            if not _becomes(sock, select.POLLOUT, patience_ms):
                break
            continue
        digest.update(data[done : done + count])
        done += count
    return done


def _becomes(sock: socket.socket, event: int, patience_ms: int) -> bool:
    """Whether the socket becomes readable or writable within the time; also when it has ended, which the next call tells."""
    if not patience_ms:
        return False
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(patience_ms))
