"""Memory for blocks that arrive: one region, used over and over, so that any number of fetches takes no more than that.

A sink wants all blocks in one view. Fresh memory for each handle would cost its page faults, several times what the copy costs,
and many handles at once could take any amount of it.
"""

from __future__ import annotations

import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from workers.transfers.arena import slabs_of
from workers.transfers.room import Room
from workers.transfers.slabs import Run

_START = mmap.PAGESIZE // 2  # see `arena.Header.of`: copies from the start of a page are slow


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Staging memory that somebody has, until `Staging.give_back`."""

    run: Run
    data: memoryview


class Staging:
    """`nbytes` of memory in pieces of `slab_bytes`, taken from the system as it is used for the first time."""

    def __init__(self, nbytes: int, slab_bytes: int) -> None:
        self._slab_bytes = slab_bytes
        self._room = Room(nbytes // slab_bytes)
        self._memory: mmap.mmap | None = None

    @property
    def nbytes(self) -> int:
        """The largest handle that can be received."""
        return self._room.num_slabs * self._slab_bytes

    @property
    def nbytes_free(self) -> int:
        """What nobody has."""
        return self._room.num_free * self._slab_bytes

    def memory(self) -> memoryview:
        """All of it, for who has to make it known to somebody."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, self.nbytes + _START, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(self._memory)

    async def take(self, nbytes: int) -> Piece:
        """`nbytes` of it, once they are free; who came first is served first. Raises `TransferError` when closed."""
        run = await self._room.take(slabs_of(nbytes, self._slab_bytes))
        start = _START + run.first * self._slab_bytes
        return Piece(run, self.memory()[start : start + nbytes])

    def give_back(self, piece: Piece) -> None:
        """Free a piece that `take` gave: nobody writes into it any more."""
        self._room.give_back(piece.run)

    @asynccontextmanager
    async def hold(self, nbytes: int) -> AsyncIterator[memoryview]:
        """`take`, and `give_back` at the end."""
        piece = await self.take(nbytes)
        try:
            yield piece.data
        finally:
            self.give_back(piece)

    def close(self) -> None:
        """Nobody gets any more of it; the memory goes with the last view."""
        self._room.close()
        self._memory = None
