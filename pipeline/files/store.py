"""The store of files: bytes first, then the record, so that what is known is whole; the other way round when a file goes.

What a process leaves that dies in between (bytes without a record) is swept, and so is what has expired.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import structlog

from pipeline.config import FilesSettings
from pipeline.connection import Connection
from pipeline.errors import FileTooLarge, NoSuchFile, RedisUnavailable, StorageUnavailable, UploadTimeout
from pipeline.files.record import IDS, FileRecord, clean_name
from pipeline.files.records import FileRecords
from pipeline.files.scratch import Scratch
from pipeline.files.storage import Storage, Writing

WRITE_BYTES, READ_BYTES = 2**20, 2**22  # at once

log = structlog.get_logger("baton.files")


class FileStore:
    """All files. Methods raise StorageUnavailable and RedisUnavailable; the constructor ConfigError."""

    def __init__(self, settings: FilesSettings, connection: Connection, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self._storage = Storage(settings)
        self._records = FileRecords(connection)
        self._clock = clock
        self.scratch = Scratch(self._storage, self._records)

    @contextlib.asynccontextmanager
    async def upload(self, max_bytes: int | None = None) -> AsyncIterator[Upload]:
        """A new file, which is there when `finish` has returned; without it nothing is. Raises UploadTimeout."""
        file_id = IDS.new(self._clock())
        place = f"{await self._records.folder()}/{file_id}"
        writing = self._storage.writing(place)
        try:
            async with asyncio.timeout(self.settings.upload_s):
                yield Upload(file_id, place, writing, self._records, max_bytes)
        except TimeoutError as error:
            raise UploadTimeout(f"the upload took longer than {self.settings.upload_s:g} s (files.upload_s)") from error
        finally:
            await writing.discard()

    async def find(self, file_id: str, owner: str) -> FileRecord:
        """A file of an owner. Raises NoSuchFile, also for those of others."""
        record = await self._records.find(file_id) if IDS.has(file_id) else None
        if record is None or record.owner != owner or not record.is_there(self._clock()):
            raise NoSuchFile(file_id)
        return record

    async def read(self, record: FileRecord, start: int, stop: int) -> bytes:
        """Some bytes of a file. Raises FileLost."""
        return await self._storage.read(record.place, start, stop) if stop > start else b""

    async def blocks(self, record: FileRecord, start: int, stop: int) -> AsyncIterator[bytes]:
        """The same, a block at a time. Raises FileLost."""
        for begin in range(start, stop, READ_BYTES):
            yield await self.read(record, begin, min(begin + READ_BYTES, stop))

    async def page(
        self, owner: str, *, purpose: str, after: str, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """A page of an owner's files, and whether more follow."""
        now_s = self._clock()
        found = await self._records.page(owner, purpose, after, limit + 1, now_s, newest_first=newest_first)
        return found[:limit], len(found) > limit

    async def delete(self, record: FileRecord) -> None:
        """It is gone when its record is; bytes that cannot be removed now are swept."""
        await self._records.drop(record)
        with contextlib.suppress(StorageUnavailable):
            await self._storage.remove(record.place)

    async def run(self) -> None:
        """Sweep, for ever: one process at a time."""
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            try:
                if await self._records.takes_turn(self.settings.sweep_s):
                    await self.sweep()
            except (RedisUnavailable, StorageUnavailable) as error:
                log.warning("files were not swept", error=str(error), then=f"again in {self.settings.sweep_s:g} s")

    async def sweep(self) -> tuple[int, int]:
        """Remove what has expired, and what is left of uploads that did not end. Answers how many of each."""
        expired = await self._records.expired(self._clock())
        for record in expired:
            await self.delete(record)
        folder = await self._records.folder()
        old = [name for name in await self._storage.names(folder) if self._is_old(name)]
        left = await self._records.unknown(old)
        for name in left:
            await self._storage.remove(f"{folder}/{name}")
        torn = len(left) + await self._storage.abandon(folder, self._is_old)
        if expired or torn:
            log.info("files swept", expired=len(expired), torn=torn)
        return len(expired), torn

    def _is_old(self, name: str) -> bool:
        """Whether no upload of that name can still run, nor wait for its record."""
        return IDS.has(name) and IDS.made_s(name) < self._clock() - 2 * self.settings.upload_s


class Upload:
    """A file that is being written."""

    def __init__(self, file_id: str, place: str, writing: Writing, records: FileRecords, max_bytes: int | None) -> None:
        self.id = file_id
        self.bytes = 0
        self._place = place
        self._writing = writing
        self._records = records
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """More of it, kept until there is a block. Raises FileTooLarge."""
        self.bytes += len(data)
        if self._max_bytes is not None and self.bytes > self._max_bytes:
            raise FileTooLarge(self._max_bytes)
        self._buffer += data
        if len(self._buffer) >= WRITE_BYTES:
            await self._flush()

    async def finish(self, *, owner: str, purpose: str, filename: str, expires_after_s: int = 0) -> FileRecord:
        """All is written: keep it, then make it known. `expires_after_s` 0: never."""
        await self._flush()
        await self._writing.close()
        created_s = int(IDS.made_s(self.id))
        record = FileRecord(
            id=self.id, owner=owner, purpose=purpose, filename=clean_name(filename), bytes=self.bytes, created_s=created_s,
            expires_s=created_s + expires_after_s if expires_after_s else 0, place=self._place,
        )  # fmt: skip
        await self._records.put(
            record
        )  # where it fails Redis may know it all the same: then it is whole, else it is swept
        return record

    async def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        await self._writing.write(data)
