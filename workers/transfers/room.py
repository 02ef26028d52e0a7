"""Room for runs of slabs that several want: who came first is served first, and waits until enough neighbouring ones are free."""

from __future__ import annotations

import asyncio

from pipeline.errors import TransferError
from workers.transfers.slabs import Run, SlabMap


class Room:
    """`num_slabs` slabs, all free at first. Used from one event loop."""

    def __init__(self, num_slabs: int) -> None:
        self._slabs = SlabMap(num_slabs)
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()  # something was given back since the first in turn looked
        self._closed = False

    @property
    def num_slabs(self) -> int:
        """Slabs in all, taken or not."""
        return self._slabs.num_slabs

    @property
    def num_free(self) -> int:
        """Slabs that nobody has."""
        return self._slabs.num_free

    async def take(self, count: int) -> Run:
        """`count` neighbouring slabs, once they are free. Who comes later waits behind, else a long run might never be.

        `count` must not be above `num_slabs`. Raises `TransferError` when the room is closed.
        """
        async with self._turn:
            while True:
                if self._closed:
                    raise TransferError("the transfer was closed while its blocks waited for room")
                if (run := self._slabs.take(count)) is not None:
                    return run
                self._freed.clear()
                await self._freed.wait()

    def give_back(self, run: Run) -> None:
        """Free a run that `take` gave."""
        self._slabs.give_back(run)
        self._freed.set()

    def close(self) -> None:
        """Nothing is taken any more; who waits is told so."""
        self._closed = True
        self._freed.set()
