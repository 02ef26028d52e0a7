"""What a process has exported, until it is released: bytes in host memory, on a GPU, or on a GPU with a place kept in host memory.

An export of blocks that lie on a GPU stays there where readers may open GPU memory. Its place in host memory is filled only
when a reader asks who cannot (`fill`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from pathlib import Path

import xxhash

from pipeline.config import TransferSettings
from pipeline.errors import TransferError
from workers.transfer import BlockSource
from workers.transfers.arena import clear_orphans
from workers.transfers.copies import CopyThreads
from workers.transfers.shelves import DeviceShelf, HostShelf, Placed, Shelf

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """Bytes that lie in the store under a handle's id. Void from `release` on."""

    id: str
    nbytes: int
    digest: str | None  # xxh3-128, where `transfer.verify` asks for it
    host: Placed | None  # where it lies in host memory, or may be filled in
    device: Placed | None  # where it lies on the GPU


class BlockStore:
    """The exports of one process. Used from one event loop, but for `view` and `place`, which threads may use, too."""

    def __init__(self, settings: TransferSettings, owner: str, copies: CopyThreads) -> None:
        self._settings = settings
        self._owner = owner
        self._copies = copies
        self._host: HostShelf | None = None
        self._device: DeviceShelf | None = None
        self._exports: dict[str, Export] = {}
        self._fills: dict[str, asyncio.Future[None]] = {}  # of exports that lie on the GPU, by id
        self._exported_bytes = 0
        self._is_open = False

    async def start(self, device: int | None = None, *, host: bool = True, on_device: bool = False) -> None:
        """Remove what crashed processes left, then take memory: of the host, pinned for `device`, and of the device.

        Raises `TransferError`.
        """
        setting_up = asyncio.ensure_future(asyncio.to_thread(self._create, device, host, on_device))
        try:
            await asyncio.shield(setting_up)
        except asyncio.CancelledError:  # the thread goes on: what it makes is removed by `close`
            await asyncio.wait([setting_up])
            raise
        self._is_open = True

    @property
    def device(self) -> DeviceShelf | None:
        """Where exports lie on the GPU."""
        return self._device

    async def export(self, blocks: BlockSource) -> Export:
        """Copy the blocks in. Waits, in order of arrival, until enough neighbouring slabs are free.

        Raises `TransferError` where the whole arena is too small, or where the store is closed.
        """
        self._check_open()
        shelves = self._shelves_for(blocks)
        taken: dict[Shelf, Placed] = {}
        try:
            for shelf in shelves:
                taken[shelf] = await shelf.take(blocks.nbytes)
            digest = await self._gather(blocks, shelves[0], taken[shelves[0]])
            self._check_open()
        except BaseException:
            self._give_back(taken)
            raise
        host = taken.get(self._host) if self._host else None
        device = taken.get(self._device) if self._device else None
        export = Export(uuid.uuid4().hex, blocks.nbytes, digest, host, device)
        self._exports[export.id] = export
        self._exported_bytes += export.nbytes
        return export

    def find(self, handle_id: str, generation: int) -> Export | None:
        """The export of that id and generation in host memory, or None where it was released or never was."""
        export = self._exports.get(handle_id)
        return export if export is not None and export.host and export.host.generation == generation else None

    async def fill(self, export: Export) -> None:
        """Have its bytes in host memory. One copy from the GPU, for which whoever comes later waits, too.

        Raises `TransferError` where it is released or the store closes before.
        """
        if export.device is None:
            return
        if export.id not in self._exports:
            raise TransferError(f"handle {export.id} was released")
        so_far = self._fills.get(export.id)
        if so_far is None or (so_far.done() and (so_far.cancelled() or so_far.exception() is not None)):
            self._fills[export.id] = asyncio.ensure_future(self._fill(export))
        await asyncio.shield(self._fills[export.id])

    def view(self, export: Export) -> memoryview:
        """Its bytes in host memory. Read only while `find` gives it, or prove afterwards what was read."""
        assert self._host is not None
        assert export.host is not None
        return self._host.memory(export.host, export.nbytes)

    def memory(self) -> memoryview:
        """All of the arena in host memory, header and generations included."""
        assert self._host is not None
        return self._host.whole()

    def place(self, export: Export) -> tuple[int, int]:
        """Where its bytes lie for a system call: the arena's descriptor, which stays the store's, and the offset."""
        assert self._host is not None
        assert export.host is not None
        return self._host.place(export.host)

    def release(self, handle_id: str) -> None:
        """Free an export: its generation is void from here on. Unknown ids are ignored."""
        export = self._exports.pop(handle_id, None)
        if export is None:
            return
        taken = self._taken(export)
        filling = self._fills.pop(handle_id, None)
        if filling is None or filling.done():
            self._give_back(taken)
            return
        for shelf, placed in taken.items():  # memory never changes hands under a running copy
            shelf.void(placed)
        filling.add_done_callback(lambda _: self._give_back(taken))

    @property
    def num_exports(self) -> int:
        """Exports that were not released."""
        return len(self._exports)

    @property
    def bytes_used(self) -> int:
        """Bytes of slabs that are taken, since slabs are what is taken, where the least is free."""
        shelf = self._fullest()
        return shelf.nbytes - shelf.bytes_free if shelf else 0

    @property
    def bytes_free(self) -> int:
        """Bytes of slabs that nobody has, where the least is free."""
        shelf = self._fullest()
        return shelf.bytes_free if shelf else 0

    @property
    def exported_bytes(self) -> int:
        """Bytes of all exports so far."""
        return self._exported_bytes

    def refuse(self) -> None:
        """Export nothing more; exports that wait for room or are being copied are told."""
        self._is_open = False
        for shelf in self._shelves():
            shelf.refuse()

    def close(self) -> None:
        """Give the memory back, with whatever is still exported. No copy may run any more. May be called twice."""
        shelves = self._shelves()
        self._host = self._device = None
        self._exports.clear()
        for shelf in shelves:
            shelf.close()

    def _create(self, device: int | None, host: bool, on_device: bool) -> None:
        clear_orphans(Path(self._settings.dir))
        if host:
            self._host = HostShelf.create(self._settings, self._owner, device)
        if device is not None and on_device:
            try:
                self._device = DeviceShelf.create(self._settings, self._owner, device)
            except TransferError as error:
                if not host:  # nothing else is left
                    raise
                log.warning("exports go through host memory: %s", error)

    def _shelves(self) -> list[Shelf]:
        return [shelf for shelf in (self._device, self._host) if shelf is not None]

    def _fullest(self) -> Shelf | None:
        return min(self._shelves(), key=lambda shelf: shelf.bytes_free, default=None)

    def _check_open(self) -> None:
        if not self._is_open:
            raise TransferError(f"the transfer of {self._owner} is closed: it exports nothing more")

    def _shelves_for(self, blocks: BlockSource) -> list[Shelf]:
        """Where to lay these blocks: they are copied to the first, and have a place on the others."""
        here = [shelf for shelf in self._shelves() if shelf is self._host or blocks.device is not None]
        fitting = [shelf for shelf in here if shelf.fits(blocks.nbytes)]
        if fitting:
            return fitting
        largest = max((shelf.nbytes for shelf in here), default=0)
        raise TransferError(
            f"request {blocks.request_id}: its {blocks.nbytes} bytes of blocks can never fit into an arena of {largest}; "
            f"raise transfer.arena_bytes (now {self._settings.arena_bytes})"
        )

    async def _gather(self, blocks: BlockSource, shelf: Shelf, placed: Placed) -> str | None:
        memory = shelf.memory(placed, blocks.nbytes)

        def gather() -> str | None:
            blocks.gather(memory)
            return digest_of(memory) if self._settings.verify and isinstance(memory, memoryview) else None

        return await self._copies.copy(blocks.nbytes, gather, device=blocks.device)

    async def _fill(self, export: Export) -> None:
        from workers import cuda

        assert self._device is not None
        assert export.device is not None
        source, target = self._device.memory(export.device, export.nbytes), self.view(export)
        try:
            await self._copies.run(lambda: cuda.copy_out(source.device, source.address, target))
        except (cuda.CudaError, RuntimeError) as error:
            log.warning("handle %s cannot be put into host memory: %s", export.id, error)
            raise TransferError(f"handle {export.id} cannot be put into host memory: {error}") from error

    def _taken(self, export: Export) -> dict[Shelf, Placed]:
        places = ((self._device, export.device), (self._host, export.host))
        return {shelf: placed for shelf, placed in places if shelf is not None and placed is not None}

    def _give_back(self, taken: dict[Shelf, Placed]) -> None:
        for shelf, placed in taken.items():
            if shelf in (self._device, self._host):  # else it is closed meanwhile
                shelf.give_back(placed)


def digest_of(data: memoryview) -> str:
    """xxh3-128 of exported bytes, as a handle carries it."""
    return xxhash.xxh3_128_hexdigest(data)
