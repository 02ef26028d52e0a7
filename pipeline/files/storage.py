"""Bytes by their place, in whatever `fsspec` reaches: a folder, S3, others. It blocks, so each call is made in a thread and has a limit.

An object is not there before it is whole where the store says so (S3: an upload in parts); in a folder it grows. Nobody sees the
difference: a place is never used twice, and a record names it only when all is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
import structlog
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileOpener
from fsspec.spec import AbstractBufferedFile

from pipeline.config import FilesSettings
from pipeline.errors import ConfigError, FileLost, StorageUnavailable
from pipeline.waiting import begun_in_thread

THREADS = 8  # at once
PART_BYTES = (
    5 * 2**20
)  # of an upload in parts: the least that S3 takes, since each that runs holds several copies of one

log = structlog.get_logger("baton.files")
T = TypeVar("T")


class Storage:
    """The store of `[files]`. Raises ConfigError where there can be none; every method raises StorageUnavailable."""

    def __init__(self, settings: FilesSettings) -> None:
        self._timeout_s = settings.timeout_s
        self._fs, self._root = _opened(settings)
        self._slots = asyncio.Semaphore(THREADS)

    def writing(self, place: str) -> Writing:
        """A new object."""
        return Writing(self, self._fs, self._path(place))

    async def read(self, place: str, start: int, stop: int) -> bytes:
        """Some of its bytes. Raises FileLost where they are not there."""
        data: bytes = await self.run("read", _read, self._fs, self._path(place), start, stop)
        if len(data) != stop - start:
            raise FileLost(
                f"the store of files has {len(data)} of the {stop - start} bytes from {start} on: somebody removed them there, or "
                "files.url is another one here than where they were written"
            )
        return data

    async def remove(self, place: str) -> None:
        """Forget an object, if it is there."""
        await self.run("remove", _remove, self._fs, self._path(place))

    async def names(self, folder: str) -> list[str]:
        """Of all objects in a folder."""
        return await self.run("list", _names, self._fs, self._path(folder))

    async def abandon(self, folder: str, is_old: Callable[[str], bool]) -> int:
        """End uploads in parts that nobody will complete, by their names: a store keeps their parts until then. Answers how many."""
        return await self.run("clean", _abandon, self._fs, self._path(folder), is_old)

    async def run(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """A call in a thread; one that takes too long is left to itself."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._slots.acquire()
                call = begun_in_thread(function, *args)
                call.add_done_callback(lambda _: self._slots.release())
                return await asyncio.shield(call)
        except Exception as error:  # each file system raises errors of its own
            log.warning("the store of files failed", call=what, error=str(error)[:500], kind=type(error).__name__)
            raise StorageUnavailable(f"the store of files failed to {what}: send the request again later") from error

    def _path(self, place: str) -> str:
        return f"{self._root}/{place}"


class Writing:
    """An object that is being written: written to its end and closed, or discarded, which leaves nothing."""

    def __init__(self, storage: Storage, fs: Any, path: str) -> None:
        self._storage = storage
        self._fs = fs
        self._path = path
        self._file: Any = None
        self._is_over = False
        self._turn = threading.Lock()  # one that was cancelled goes on in its thread, and what follows waits for it

    async def write(self, data: bytes) -> None:
        """More of it."""
        await self._storage.run("write", self._write, data)

    async def close(self) -> None:
        """All is written: when this returns it is kept."""
        await self._storage.run("complete an upload", self._close)

    async def discard(self) -> None:
        """Leave nothing of what was not closed. What fails is logged, and left to the sweep."""
        if not self._is_over:
            with contextlib.suppress(StorageUnavailable):
                await self._storage.run("discard an upload", self._discard)

    def _write(self, data: bytes) -> None:
        with self._turn:
            if not self._is_over:
                self._opened().write(data)

    def _close(self) -> None:
        with self._turn:
            file = self._opened()
            if isinstance(file, LocalFileOpener):
                file.flush()
                os.fsync(file.fileno())
            file.close()
            self._is_over = True

    def _discard(self) -> None:
        with self._turn:
            self._is_over = True
            if self._file is None:
                return
            if isinstance(self._file, AbstractBufferedFile):
                try:
                    self._file.discard()
                finally:
                    self._file.closed = True  # else its end would complete it
            else:
                self._file.close()
            _remove(self._fs, self._path)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._fs.open(self._path, "wb", block_size=PART_BYTES)
        return self._file


def is_folder(url: str) -> bool:
    """Whether it is one of this machine, which the first file makes."""
    return "://" not in url or url.startswith("file://")


def _opened(settings: FilesSettings) -> tuple[Any, str]:
    try:
        options = msgspec.json.decode(settings.storage_options or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"files.storage_options: expected a JSON object: {error}") from error
    try:
        fs, root = url_to_fs(settings.url, **({"auto_mkdir": True} if is_folder(settings.url) else {}), **options)
    except ImportError as error:
        raise ConfigError(f"files.url: {error}; for s3:// install baton-serve[s3]") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"files.url, files.storage_options: {error}") from error
    return fs, str(root).rstrip("/")


def _read(fs: Any, path: str, start: int, stop: int) -> Any:
    try:
        return fs.cat_file(path, start=start, end=stop)
    except FileNotFoundError:
        return b""


def _remove(fs: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def _names(fs: Any, path: str) -> list[str]:
    fs.invalidate_cache()
    return [str(found).rpartition("/")[2] for found in fs.find(path)]


def _abandon(fs: Any, path: str, is_old: Callable[[str], bool]) -> int:
    if not hasattr(fs, "list_multipart_uploads"):
        return 0
    bucket, prefix, _ = fs.split_path(path)
    uploads: Iterable[dict[str, Any]] = fs.list_multipart_uploads(bucket)
    old = [one for one in uploads if one["Key"].startswith(f"{prefix}/") and is_old(one["Key"].rpartition("/")[2])]
    for one in old:
        fs.abort_mpu(bucket, one["Key"], one["UploadId"])
    return len(old)
