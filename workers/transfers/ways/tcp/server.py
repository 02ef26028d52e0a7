"""The owner's side: listens, lets in who proves to know the key, sends what was exported.

1. accept: a connection is a stranger until its handshake is done. Few strangers are listened to, each for a short time; one
   more takes the place of the one that came first, which in good order has long proved itself;
2. answer requests, one after the other: look for the export, send its bytes from the arena's pages, look again;
3. close the connection when it ends, when it asks for nothing for long, or when this process closes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket

from pipeline.config import TcpSettings
from pipeline.errors import TransferError
from workers.transfers.copies import CopyThreads
from workers.transfers.store import BlockStore, Export
from workers.transfers.ways.tcp.address import LOOPBACK, look_up
from workers.transfers.ways.tcp.flow import Flow
from workers.transfers.ways.tcp.frames import REQUEST_BYTES, Request, Status, head, tail
from workers.transfers.ways.tcp.handshake import Stranger, as_owner

BACKLOG = 128
SEND_THREADS = 8
MAX_STRANGERS = 64
HANDSHAKE_S = 5.0  # longest handshake, as a whole
IDLE_S = 120.0  # a reader that asks for nothing for so long is hung up on; it forgets the connection long before
ACCEPT_PAUSE_S = 0.1  # after an error of `accept`: this process has no descriptors left

log = logging.getLogger(__name__)


class BlockServer:
    """Serves one store to whoever knows the key."""

    def __init__(self, settings: TcpSettings, store: BlockStore, key: bytes) -> None:
        self._settings = settings
        self._store = store
        self._key = key
        self._threads = CopyThreads(SEND_THREADS, "tcp-send")
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}  # of those, in the order in which they came
        self._told: set[str] = set()  # what was written to the log about strangers; all that follow would fill it

    async def start(self) -> None:
        """Listen. Raises `TransferError` where the address or the port cannot be had."""
        self._listener = await asyncio.to_thread(_listen, self._settings)
        self._accepting = asyncio.create_task(self._accept(self._listener), name="tcp accept")

    @property
    def host(self) -> str:
        """The address that is listened on."""
        return self._settings.host or LOOPBACK

    @property
    def port(self) -> int:
        """The port that is listened on, once started."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """Hang up on everybody, whatever is being sent. May be called twice."""
        tasks = [*self._serving, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await self._threads.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:
                self._tell(f"connections cannot be accepted: {error.strerror}", "")
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                first = next(iter(self._strangers))
                del self._strangers[first]
                first.cancel()
                self._tell(f"more than {MAX_STRANGERS} at once did not say who they are", address[0])
            flow = Flow(sock, self._threads, self._settings.timeout_s)
            task = asyncio.create_task(self._serve(flow, address[0]))
            self._strangers[task] = None
            self._serving.add(task)
            task.add_done_callback(functools.partial(self._end, flow))

    def _end(self, flow: Flow, task: asyncio.Task[None]) -> None:
        """Here, not in the task: one that is cancelled before it began does nothing."""
        flow.close()
        self._serving.discard(task)
        self._strangers.pop(task, None)

    async def _serve(self, flow: Flow, address: str) -> None:
        try:
            if await self._is_known(flow, address):
                while True:
                    request = Request.unpack(await flow.read(REQUEST_BYTES, timeout_s=IDLE_S))
                    await self._answer(flow, request)
        except (OSError, TransferError) as error:  # it has gone, or this process closes
            log.debug("connection of %s ended: %s", address, error)

    async def _is_known(self, flow: Flow, address: str) -> bool:
        try:
            async with asyncio.timeout(min(HANDSHAKE_S, self._settings.timeout_s)):
                await as_owner(flow, self._key)
        except Stranger as error:
            self._tell(str(error), address)
            return False
        except OSError:
            self._tell("it did not say who it is", address)
            return False
        task = asyncio.current_task()
        assert task is not None
        self._strangers.pop(task, None)
        return True

    async def _answer(self, flow: Flow, request: Request) -> None:
        export = self._store.find(request.handle_id, request.generation)
        if export is None or not await self._is_filled(export):
            await flow.write(head(Status.GENERATION))
            return
        if request.offset + request.nbytes > export.nbytes:
            await flow.write(head(Status.OUTSIDE))
            return
        await flow.write(head(Status.SENT))
        fd, start = self._store.place(export)
        part = self._store.view(export)[request.offset : request.offset + request.nbytes]
        digest = await flow.send_file(fd, start + request.offset, part)
        held = self._store.find(request.handle_id, request.generation) is export
        await flow.write(tail(Status.SENT if held else Status.GENERATION, digest))

    async def _is_filled(self, export: Export) -> bool:
        """Have its bytes in host memory; False where it was released before they were there."""
        try:
            await self._store.fill(export)
        except TransferError:
            return False
        return True

    def _tell(self, what: str, address: str) -> None:
        """Once for each thing that can happen: who knocks on doors knocks often."""
        if what not in self._told:
            self._told.add(what)
            log.warning("refused a connection of %s: %s; more of these are not told", address or "somebody", what)


def _listen(settings: TcpSettings) -> socket.socket:
    host = settings.host or LOOPBACK
    try:
        family, address = look_up(host, settings.port, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise TransferError(f"transfer.tcp.host = {host!r} is no address of this host: {error}") from error
    try:
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise TransferError(
            f"cannot listen on transfer.tcp.host = {host!r}, transfer.tcp.port = {settings.port}: {error.strerror}; "
            "port 0 takes one that is free"
        ) from error
    listener.setblocking(False)
    return listener
