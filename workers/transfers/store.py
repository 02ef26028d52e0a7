"""What a process has exported: bytes in its arena, each export a run of slabs of one generation, until it is released."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from pathlib import Path

import xxhash

from pipeline.config import TransferSettings
from pipeline.errors import TransferError
from workers.transfer import BlockSource
from workers.transfers.arena import Arena, clear_orphans, slabs_of
from workers.transfers.copies import CopyThreads
from workers.transfers.room import Room
from workers.transfers.slabs import Run


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """Bytes that lie in the store under a handle's id. Void from `release` on."""

    id: str
    arena: str  # name of the file
    run: Run
    generation: int
    nbytes: int
    digest: str | None  # xxh3-128, where `transfer.verify` asks for it


class BlockStore:
    """The exports of one process. Used from one event loop, but for `view` and `fileno`, which threads may use, too."""

    def __init__(self, settings: TransferSettings, owner: str, copies: CopyThreads) -> None:
        self._settings = settings
        self._owner = owner
        self._copies = copies
        self._arena: Arena | None = None
        self._room = Room(0)
        self._exports: dict[str, Export] = {}
        self._exported_bytes = 0
        self._is_refusing = False

    async def start(self) -> None:
        """Remove what crashed processes left, then take the arena's memory. Raises `TransferError`."""
        setting_up = asyncio.ensure_future(asyncio.to_thread(self._create))
        try:
            self._arena = await asyncio.shield(setting_up)
        except asyncio.CancelledError:  # the thread goes on: what it makes is removed by `close`
            await asyncio.wait([setting_up])
            self._arena = None if setting_up.exception() else setting_up.result()
            raise
        self._room = Room(self._arena.num_slabs)

    async def export(self, blocks: BlockSource) -> Export:
        """Copy the blocks in. Waits, in order of arrival, until enough neighbouring slabs are free.

        Raises `TransferError` where the whole arena is too small, or where the store is closed.
        """
        arena = self._open_arena()
        run = await self._room.take(self._slabs_for(blocks, arena))
        try:
            generation = arena.raise_generation(run)
            digest = await self._copies.copy(blocks.nbytes, lambda: self._gather(arena, run, blocks))
            self._open_arena()
        except BaseException:
            self._free(run)
            raise
        export = Export(uuid.uuid4().hex, arena.name, run, generation, blocks.nbytes, digest)
        self._exports[export.id] = export
        self._exported_bytes += export.nbytes
        return export

    def find(self, handle_id: str, generation: int) -> Export | None:
        """The export of that id and generation, or None where it was released or never was."""
        export = self._exports.get(handle_id)
        return export if export is not None and export.generation == generation else None

    def view(self, export: Export) -> memoryview:
        """Its bytes. Read only while `find` gives it, or prove afterwards what was read."""
        return self._open_arena().view(export.run, export.nbytes)

    def place(self, export: Export) -> tuple[int, int]:
        """Where its bytes lie for a system call: the arena's descriptor, which stays the store's, and the offset."""
        return self._open_arena().place(export.run)

    def memory(self) -> memoryview:
        """All of the arena, header and generations included, as it lies in this process."""
        return self._open_arena().memory()

    def release(self, handle_id: str) -> None:
        """Free an export: its generation is void from here on. Unknown ids are ignored."""
        if (export := self._exports.pop(handle_id, None)) is not None:
            self._free(export.run)

    @property
    def num_exports(self) -> int:
        """Exports that were not released."""
        return len(self._exports)

    @property
    def bytes_used(self) -> int:
        """Bytes of slabs that are taken, since slabs are what is taken."""
        return (self._room.num_slabs - self._room.num_free) * self._slab_bytes()

    @property
    def bytes_free(self) -> int:
        """Bytes of slabs that nobody has."""
        return self._room.num_free * self._slab_bytes()

    @property
    def exported_bytes(self) -> int:
        """Bytes of all exports so far."""
        return self._exported_bytes

    def refuse(self) -> None:
        """Export nothing more; exports that wait for room or are being copied are told."""
        self._is_refusing = True
        self._room.close()

    def close(self) -> None:
        """Remove the arena, with whatever is still exported. No copy may run any more. May be called twice."""
        arena, self._arena = self._arena, None
        self._room = Room(0)
        self._exports.clear()
        if arena is not None:
            arena.close()

    def _create(self) -> Arena:
        directory = Path(self._settings.dir)
        clear_orphans(directory)
        return Arena.create(
            directory, self._owner, arena_bytes=self._settings.arena_bytes, slab_bytes=self._settings.slab_bytes
        )

    def _open_arena(self) -> Arena:
        if self._arena is None or self._is_refusing:
            raise TransferError(f"the transfer of {self._owner} is closed: it exports nothing more")
        return self._arena

    def _slab_bytes(self) -> int:
        return self._arena.slab_bytes if self._arena else 0

    def _slabs_for(self, blocks: BlockSource, arena: Arena) -> int:
        count = slabs_of(blocks.nbytes, arena.slab_bytes)
        if count > arena.num_slabs:
            raise TransferError(
                f"request {blocks.request_id}: its {blocks.nbytes} bytes of blocks can never fit into an arena of "
                f"{arena.num_slabs * arena.slab_bytes}; raise transfer.arena_bytes (now {self._settings.arena_bytes})"
            )
        return count

    def _gather(self, arena: Arena, run: Run, blocks: BlockSource) -> str | None:
        data = arena.view(run, blocks.nbytes)
        blocks.gather(data)
        return digest_of(data) if self._settings.verify else None

    def _free(self, run: Run) -> None:
        if self._arena is None:  # closed meanwhile
            return
        self._arena.raise_generation(run)
        self._room.give_back(run)


def digest_of(data: memoryview) -> str:
    """xxh3-128 of exported bytes, as a handle carries it."""
    return xxhash.xxh3_128_hexdigest(data)
