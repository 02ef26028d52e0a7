"""Objects in the store of files that are no files: what a batch has so far. Whoever keeps them names them, and removes them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from pipeline.errors import StorageUnavailable
from pipeline.files.records import FileRecords
from pipeline.files.storage import Storage

READ_BYTES = 2**20  # at once


class Scratch:
    """Objects by their name, beside the files of the same Redis. Methods raise StorageUnavailable and RedisUnavailable."""

    def __init__(self, storage: Storage, records: FileRecords) -> None:
        self._storage = storage
        self._records = records

    async def keep(self, name: str, data: bytes) -> str:
        """Write an object under a name that was never used; answers its place. When this returns it is kept."""
        place = f"{await self._records.folder()}/{name}"
        writing = self._storage.writing(place)
        try:
            await writing.write(data)
            await writing.close()
        finally:
            await writing.discard()
        return place

    async def blocks(self, place: str, nbytes: int) -> AsyncIterator[bytes]:
        """An object, a block at a time. Raises FileLost."""
        for start in range(0, nbytes, READ_BYTES):
            yield await self._storage.read(place, start, min(start + READ_BYTES, nbytes))

    async def remove(self, name: str) -> None:
        """Forget an object; a store that fails keeps it, until a sweep finds it."""
        with contextlib.suppress(StorageUnavailable):
            await self._storage.remove(f"{await self._records.folder()}/{name}")

    async def names(self) -> list[str]:
        """Of all objects, those of files, too."""
        return await self._storage.names(await self._records.folder())
