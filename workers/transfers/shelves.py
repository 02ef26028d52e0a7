"""Where a store lays what it exports: in host memory that others map, or in memory of a GPU that others open.

A shelf is an arena with its room. That of a GPU has a file of an arena, too, without slabs: its ledger. The name proves that reader and
owner are on one host, the generations are looked at there, and it holds what opens the memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import TransferSettings
from pipeline.errors import TransferError
from workers.transfer import DeviceBytes, Memory
from workers.transfers.arena import LEDGER_MAGIC, Arena, slabs_of
from workers.transfers.pins import pin
from workers.transfers.room import Room
from workers.transfers.slabs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an export lies: a run of slabs of one generation in the arena of that name."""

    arena: str
    run: Run
    generation: int


class Shelf:
    """See the module's docstring. `room` is used from one event loop; the rest by threads, too."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._room = Room(arena.num_slabs)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self._arena.num_slabs * self._arena.slab_bytes

    @property
    def bytes_free(self) -> int:
        """Bytes of the slabs that nobody has."""
        return self._room.num_free * self._arena.slab_bytes

    def fits(self, nbytes: int) -> bool:
        """Whether an export of that size can ever lie here."""
        return slabs_of(nbytes, self._arena.slab_bytes) <= self._arena.num_slabs

    async def take(self, nbytes: int) -> Placed:
        """A place that nobody has; waits for it in order of arrival. It must fit. Raises `TransferError` when it is closed."""
        run = await self._room.take(slabs_of(nbytes, self._arena.slab_bytes))
        return Placed(self._arena.name, run, self._arena.raise_generation(run))

    def void(self, placed: Placed) -> None:
        """What readers hold of it is void from here on; the place is still taken."""
        self._arena.raise_generation(placed.run)

    def give_back(self, placed: Placed) -> None:
        """Void, and free for others."""
        self._arena.raise_generation(placed.run)
        self._room.give_back(placed.run)

    def refuse(self) -> None:
        """Nothing more is laid here; who waits for room is told."""
        self._room.close()

    def memory(self, placed: Placed, nbytes: int) -> Memory:
        """The bytes of a place."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory back, with whatever lies in it."""
        self._arena.close()


class HostShelf(Shelf):
    """In the file of an arena."""

    def __init__(self, arena: Arena, unpin: Callable[[], None]) -> None:
        super().__init__(arena)
        self._unpin = unpin

    @classmethod
    def create(cls, settings: TransferSettings, owner: str, device: int | None) -> HostShelf:
        """Take the memory; pinned for `device`, where there is one. Raises `TransferError`."""
        arena = Arena.create(
            Path(settings.dir), owner, arena_bytes=settings.arena_bytes, slab_bytes=settings.slab_bytes
        )
        unpin = (lambda: None) if device is None else pin(arena.whole(), device, f"arena {arena.name}")
        return cls(arena, unpin)

    def memory(self, placed: Placed, nbytes: int) -> memoryview:
        """See `Shelf.memory`."""
        return self._arena.view(placed.run, nbytes)

    def whole(self) -> memoryview:
        """All of the arena's memory."""
        return self._arena.whole()

    def place(self, placed: Placed) -> tuple[int, int]:
        """Where its bytes lie for a system call: the arena's descriptor, which stays the arena's, and the offset."""
        return self._arena.place(placed.run)

    def close(self) -> None:
        """See `Shelf.close`."""
        self._unpin()
        super().close()


class DeviceShelf(Shelf):
    """In one allocation on a GPU."""

    def __init__(self, ledger: Arena, device: int, address: int) -> None:
        super().__init__(ledger)
        self.name = ledger.name
        self.device = device
        self.address = address

    @classmethod
    def create(cls, settings: TransferSettings, owner: str, device: int) -> DeviceShelf:
        """Take the memory. Raises `TransferError`."""
        from workers import cuda

        nbytes = settings.cuda_arena_bytes or settings.arena_bytes
        ledger = Arena.create(
            Path(settings.dir), owner, arena_bytes=nbytes, slab_bytes=settings.slab_bytes, magic=LEDGER_MAGIC
        )
        address = 0
        try:
            address = cuda.allocate(device, nbytes)
            ledger.write_note(cuda.ipc_handle(address))  # what another process opens the allocation with
            return cls(ledger, device, address)
        except cuda.CudaError as error:
            ledger.close()
            if address:
                cuda.free(device, address)
            raise TransferError(
                f"transfer.cuda_arena_bytes = {settings.cuda_arena_bytes}: {nbytes} bytes of GPU {device}: {error}"
            ) from error

    def memory(self, placed: Placed, nbytes: int) -> DeviceBytes:
        """See `Shelf.memory`."""
        return DeviceBytes(self.device, self.address + placed.run.first * self._arena.slab_bytes, nbytes)

    def close(self) -> None:
        """See `Shelf.close`. Unlike a file's mapping the memory is gone at once: what is being read is void."""
        from workers import cuda

        self._arena.raise_generation(Run(0, self._arena.num_slabs))
        super().close()
        try:
            cuda.free(self.device, self.address)
        except cuda.CudaError as error:  # the device failed before: its memory goes with the process
            log.warning("memory of GPU %s is not given back: %s", self.device, error)
