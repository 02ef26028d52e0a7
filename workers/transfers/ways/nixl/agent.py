"""An agent of NIXL on a thread of its own, which alone calls it.

NIXL can progress by itself, in a thread that takes a whole processor. Here the thread sleeps: 0.1 ms between two looks at reads that
run, longer where it only answers others (RDMA needs none of that; what UCX does over TCP is answered by the owner's processor).

A read that has begun cannot be taken back. NIXL lets go of one that has not ended, and of its peer, but the bytes arrive all the same,
whenever the peer goes on. So a read is followed to its end, whoever waits for it, and until then its memory belongs to it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from workers.transfers.way import Unusable

Memory = Literal["DRAM", "VRAM"]
T = TypeVar("T")

READ_S = 0.0001  # between two looks at reads that run
STUCK_READ_S, STUCK_AFTER_S = 0.02, 10.0  # at those that have run for long
SERVE_S, IDLE_S = 0.001, 0.02  # between two looks at what others ask, with and without something to read
INSTALL = "pip install 'baton-serve[nixl]'"
CLOSED = "the transfer was closed"

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Bytes to read: from an address of the peer to one of ours. `device`: number of the GPU of `memory` VRAM."""

    theirs: int
    ours: int
    nbytes: int
    device: int = 0


@dataclass(slots=True, eq=False)
class Reading:
    """A read that runs."""

    transfer: Any  # NIXL's
    ended: asyncio.Future[None]
    begun_s: float


def load_nixl() -> Any:
    """NIXL's module. Raises `Unusable` saying how to install it."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is raised, and told by whoever asked
    try:
        return importlib.import_module("nixl._api")
    except (ImportError, OSError) as error:
        raise Unusable(f"NIXL cannot be imported ({error}): {INSTALL}") from error


class Agent:
    """See the module's docstring. Used from one event loop. `has_readers`: whether others may be reading from it now; None: never."""

    def __init__(self, name: str, backend: str, has_readers: Callable[[], bool] | None = None) -> None:
        self.name = name
        self.metadata = b""  # tells others how to reach it and what is registered; once started
        self._backend = backend
        self._has_readers = has_readers
        self._loop = asyncio.get_running_loop()
        self._nixl: Any = None
        self._orders: deque[Callable[[], None]] = deque()
        self._readings: list[Reading] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._has_told = False
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)

    async def start(self, address: int, nbytes: int, memory: Memory = "DRAM", device: int = 0) -> None:
        """Make the agent and let it know this memory. Raises `Unusable`."""
        self._thread.start()
        atexit.register(
            self._stop
        )  # a thread that the interpreter ends inside of NIXL takes the process down with an abort
        try:
            self.metadata = await self.call(lambda: self._make(address, nbytes, memory, device))
        except Unusable:
            raise
        except Exception as error:
            raise Unusable(f"NIXL does not start with {self._backend}: {error!r}") from error

    async def meet(self, metadata: bytes) -> str:
        """Know another agent; its name. Raises what NIXL raises."""
        return await self.call(lambda: _text(self._nixl.add_remote_agent(metadata)))

    async def part(self, name: str) -> None:
        """Forget another agent. Nothing may be read from it now."""
        await self.call(lambda: self._nixl.remove_remote_agent(name))

    def read(self, name: str, memory: Memory, pieces: Sequence[Piece]) -> asyncio.Future[None]:
        """Read from another agent; it ends with the read, or fails. Until it is done its memory must not be used for others."""
        ended: asyncio.Future[None] = self._loop.create_future()
        ended.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may be there to hear
        try:
            self._post(lambda: self._begin(name, memory, pieces, ended))
        except Unusable as error:
            ended.set_exception(error)
        return ended

    async def call(self, what: Callable[[], T]) -> T:
        """Run something on the thread. Raises what it raises, or `Unusable` once the agent is closed."""
        answer: asyncio.Future[T] = self._loop.create_future()

        def order() -> None:
            try:
                value = what()
            except Exception as error:  # noqa: BLE001  # it belongs to whoever asked
                self._settle(answer, error=error)
            else:
                self._settle(answer, value)

        self._post(order)
        return await answer

    async def close(self) -> None:
        """End the agent: nothing arrives any more. Reads that run fail. May be called twice."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        atexit.unregister(self._stop)

    def _post(self, order: Callable[[], None]) -> None:
        with self._changed:
            if self._is_closing:  # nobody runs it any more
                raise Unusable(CLOSED)
            self._orders.append(order)
            self._changed.notify()

    def _settle(self, future: asyncio.Future[Any], value: Any = None, *, error: Exception | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(_settle, future, value, error)

    # -- on the thread ----------------------------------------------------------------------------------------------------------

    def _make(self, address: int, nbytes: int, memory: Memory, device: int) -> bytes:
        module = load_nixl()
        config = module.nixl_agent_config(enable_prog_thread=False, backends=[self._backend])
        nixl = module.nixl_agent(self.name, config)
        if self._backend not in nixl.backends:
            raise Unusable(f"NIXL has no backend {self._backend} here (transfer.nixl.backend)")
        self._registered = nixl.register_memory([(address, nbytes, device, "")], memory)
        self._nixl = nixl
        return bytes(nixl.get_agent_metadata())

    def _run(self) -> None:
        while not self._is_closing:
            with self._changed:
                if not self._orders:
                    self._changed.wait(self._pause_s())
                orders, self._orders = self._orders, deque()
            for order in orders:
                order()
            self._look()
        self._end()

    def _pause_s(self) -> float | None:
        if self._is_closing:
            return 0.0
        if self._readings:
            newest_s = max(reading.begun_s for reading in self._readings)
            return READ_S if self._loop.time() - newest_s < STUCK_AFTER_S else STUCK_READ_S
        if self._has_readers is None or self._nixl is None:
            return None
        return SERVE_S if self._has_readers() else IDLE_S

    def _begin(self, name: str, memory: Memory, pieces: Sequence[Piece], ended: asyncio.Future[None]) -> None:
        nixl = self._nixl
        if self._is_closing:
            self._settle(ended, error=Unusable(CLOSED))
            return
        try:
            ours = nixl.get_xfer_descs([(piece.ours, piece.nbytes, 0) for piece in pieces], "DRAM")
            theirs = nixl.get_xfer_descs([(piece.theirs, piece.nbytes, piece.device) for piece in pieces], memory)
            transfer = nixl.initialize_xfer("READ", ours, theirs, name)
            state = nixl.transfer(transfer)
        except Exception as error:  # noqa: BLE001  # NIXL's own, of many kinds
            self._settle(ended, error=Unusable(f"NIXL cannot read there: {error}"))
            return
        reading = Reading(transfer, ended, self._loop.time())
        if self._is_running(reading, state):
            self._readings.append(reading)

    def _look(self) -> None:
        """See what has ended, and answer others, which each look at a state does, too."""
        self._readings = [reading for reading in self._readings if self._is_running(reading)]
        if self._has_readers is not None and self._nixl is not None:
            self._answer()

    def _answer(self) -> None:
        """Let NIXL see what others ask. A peer that ends badly must not take this thread along: everything waits for it."""
        try:
            self._nixl.get_new_notifs()
        except Exception as error:  # noqa: BLE001  # NIXL's own, of many kinds
            if not self._has_told:
                self._has_told = True
                log.warning("NIXL cannot look at what others ask: %s; more of these are not told", error)

    def _is_running(self, reading: Reading, state: str | None = None) -> bool:
        error: Exception | None = None
        try:
            state = state or self._nixl.check_xfer_state(reading.transfer)
            if state == "PROC":
                return True
            if state != "DONE":
                error = Unusable(f"NIXL's read ended with {state}")
            reading.transfer.release()
        except Exception as raised:  # noqa: BLE001  # NIXL's own, of many kinds
            error = Unusable(f"NIXL's read failed: {raised}")
        self._settle(reading.ended, error=error)
        return False

    def _end(self) -> None:
        for reading in self._readings:
            self._settle(reading.ended, error=Unusable(CLOSED))
        for order in self._orders:
            order()
        self._readings = []
        nixl, self._nixl = self._nixl, None
        if nixl is not None:
            with contextlib.suppress(Exception):
                nixl.deregister_memory(self._registered)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
