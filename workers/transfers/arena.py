"""The arena: one file of shared memory a process that exports blocks, and how other processes look into it.

The file is a header, one generation a slab, and the slabs; README.md draws it. Three rules hold it together:
- it belongs to whoever holds its `flock`, which the kernel drops with the process: never to a process id, which is reused;
- a slab's generation is raised before its bytes change and when they are given up, so a reader that finds the generation
  of its handle before and after a copy has copied the bytes of its handle (a seqlock whose writer never waits);
- only its owner writes it. Readers map it read-only and use nothing of it that they have not checked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
import struct
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import TransferError
from workers.transfers.slabs import Run

MODE = 0o600
MAGIC = b"BATONKV1"
LEDGER_MAGIC = b"BATONLG1"  # of generations and a note alone: the bytes lie elsewhere, in the memory of a GPU
NOTE_BYTES = 64
NAME = re.compile(r"baton-[A-Za-z0-9_]{1,64}-[0-9a-f]{16}")
HEADER = struct.Struct("<8sQQQQ")  # the fields of `Header`
GENERATIONS_OFFSET = 64
CREATE_ATTEMPTS = 16

log = logging.getLogger(__name__)


class Unreadable(Exception):
    """A name does not lead to an arena that may be read; the message says why."""


class Header(NamedTuple):
    """What the file opens with; fixed for its life."""

    magic: bytes
    nonce: int  # the last part of the file's name
    slab_bytes: int
    num_slabs: int
    data_offset: int  # of slab 0; in the middle of a page

    @classmethod
    def of(cls, name: str, slab_bytes: int, num_slabs: int, magic: bytes = MAGIC) -> Header:
        """The header of a file of this name, size and kind.

        Slabs start in the middle of a page because other memory starts 0, 16 or 64 bytes into one: where the two ends of a
        copy lie that close to each other modulo a page, it takes up to 1.7 times as long on AMD Zen (rep movsb).
        """
        generations_end = GENERATIONS_OFFSET + 8 * num_slabs
        data_offset = -(-generations_end // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE // 2
        return cls(magic, int(name.rpartition("-")[2], 16), slab_bytes, num_slabs, data_offset)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.data_offset + (self.num_slabs * self.slab_bytes if self.magic == MAGIC else NOTE_BYTES)

    def offset(self, run: Run) -> int:
        """Where in the file a run begins, in bytes."""
        return self.data_offset + run.first * self.slab_bytes

    def view(self, memory: mmap.mmap, run: Run, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a run; as writable as the mapping."""
        start = self.offset(run)
        return memoryview(memory)[start : start + nbytes]

    def generations(self, memory: mmap.mmap) -> npt.NDArray[np.uint64]:
        """The generation of each slab, where it lies in the file."""
        return np.frombuffer(memory, dtype="<u8", count=self.num_slabs, offset=GENERATIONS_OFFSET)


class Arena:
    """The owner's side. Made by `create`; gone from the file system with `close` or, after a crash, at the next start."""

    def __init__(self, path: Path, fd: int, memory: mmap.mmap, header: Header) -> None:
        self.path = path
        self.name = path.name
        self._fd = fd  # holds the flock
        self._memory = memory
        self._header = header
        self._generations = header.generations(memory)
        self._last_generation = 0

    @classmethod
    def create(cls, directory: Path, owner: str, *, arena_bytes: int, slab_bytes: int, magic: bytes = MAGIC) -> Arena:
        """Make the file, own it, take all of its memory and touch every page (about 0.7 ms a MiB, once).

        Raises `TransferError` where the directory, the space or the sizes do not allow it; nothing is left then.
        """
        num_slabs = arena_bytes // slab_bytes if slab_bytes > 0 else 0
        if num_slabs < 1 or slab_bytes % mmap.PAGESIZE:
            raise TransferError(
                f"transfer.slab_bytes = {slab_bytes} must be a multiple of {mmap.PAGESIZE} "
                f"and no more than transfer.arena_bytes = {arena_bytes}"
            )
        path, fd = _create_owned(directory, owner)
        try:
            header = Header.of(path.name, slab_bytes, num_slabs, magic)
            _take_space(fd, header.file_bytes, directory)
            memory = mmap.mmap(fd, header.file_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            memory[: HEADER.size] = HEADER.pack(*header)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        return cls(path, fd, memory, header)

    @property
    def num_slabs(self) -> int:
        """Slabs in all, taken or not."""
        return self._header.num_slabs

    @property
    def slab_bytes(self) -> int:
        """Bytes of one slab."""
        return self._header.slab_bytes

    def raise_generation(self, run: Run) -> int:
        """Give the run's slabs a number that no slab of this arena ever had: what readers held of them is void."""
        self._last_generation += 1
        self._generations[run.first : run.end] = self._last_generation
        full_fence()
        return self._last_generation

    def view(self, run: Run, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a run, writable."""
        return self._header.view(self._memory, run, nbytes)

    def whole(self) -> memoryview:
        """All of the file's memory."""
        return memoryview(self._memory)

    def write_note(self, note: bytes) -> None:
        """Put what a reader needs into a ledger: `NOTE_BYTES` bytes."""
        start = self._header.data_offset
        self._memory[start : start + NOTE_BYTES] = note

    def place(self, run: Run) -> tuple[int, int]:
        """The descriptor of the file and where in it a run begins, in bytes."""
        return self._fd, self._header.offset(run)

    def close(self) -> None:
        """Remove the file and give the memory back. A view that is still held keeps its memory, but no name, until it goes."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        del self._generations
        with contextlib.suppress(BufferError):  # a view is still held: the mapping ends with it
            self._memory.close()


class PeerArena:
    """A reader's side: another process's arena (or this one's), read-only. The mapping ends with the last view of it."""

    def __init__(self, path: Path, identity: tuple[int, int], memory: mmap.mmap, header: Header) -> None:
        self._path = path
        self._identity = identity
        self._memory = memory
        self._header = header
        self._generations = header.generations(memory)

    @classmethod
    def open(cls, directory: Path, name: str, magic: bytes = MAGIC) -> PeerArena:
        """Map an arena of that kind. The name must match `NAME`, so that it cannot lead out of `directory`.

        Raises `Unreadable` where there is no such file, or where it is not an arena that this user's processes made.
        """
        path = directory / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Unreadable(f"arena {name}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if not _is_ours(status) or stat.S_IMODE(status.st_mode) != MODE:
                raise Unreadable(f"arena {name}: it is not a file of user {os.geteuid()} with mode {MODE:o}")
            if status.st_size < mmap.PAGESIZE:
                raise Unreadable(f"arena {name}: it is too short")
            memory = mmap.mmap(fd, status.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise Unreadable(f"arena {name}: {error.strerror}") from error
        finally:
            os.close(fd)
        header = Header(*HEADER.unpack_from(memory))
        if header.slab_bytes < 1 or header != Header.of(name, header.slab_bytes, header.num_slabs, magic):
            raise Unreadable(f"arena {name}: its header is not that of an arena of this name")
        if header.file_bytes > status.st_size:
            raise Unreadable(f"arena {name}: it is shorter than its header says")
        return cls(path, (status.st_dev, status.st_ino), memory, header)

    def is_current(self) -> bool:
        """Whether the path still names what is mapped here. After a crash of the owner it does until the next start."""
        try:
            status = self._path.stat(follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def is_owned(self) -> bool:
        """Whether the owner still lives. The look takes the file's lock for a moment, with other readers together."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            return not _lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    @property
    def slab_bytes(self) -> int:
        """Bytes of one slab."""
        return self._header.slab_bytes

    def whole(self) -> memoryview:
        """All of the file's memory, read-only."""
        return memoryview(self._memory)

    def note(self) -> bytes:
        """What the owner of a ledger has put there for its readers."""
        start = self._header.data_offset
        return self._memory[start : start + NOTE_BYTES]

    def covers(self, run: Run, nbytes: int) -> bool:
        """Whether the run lies inside of the arena and is what an export of `nbytes` bytes takes."""
        inside = 0 <= run.first < run.end <= self._header.num_slabs
        return inside and run.length == slabs_of(nbytes, self._header.slab_bytes)

    def holds(self, run: Run, generation: int) -> bool:
        """Whether every slab of the run is of this generation now. Ordered against the copies before and after it."""
        full_fence()
        held = bool((self._generations[run.first : run.end] == generation).all())
        full_fence()
        return held

    def view(self, run: Run, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a run, read-only."""
        return self._header.view(self._memory, run, nbytes)


def slabs_of(nbytes: int, slab_bytes: int) -> int:
    """How many slabs an export takes; at least one, so that an empty one has a generation too."""
    return max(1, -(-nbytes // slab_bytes))


def remove_orphans(directory: Path) -> list[str]:
    """Remove the arenas in `directory` that no process owns any more; returns their names.

    Any number of processes may do this at once, also while others create theirs (see `_create_owned`).
    """
    arenas = sorted(path for path in directory.iterdir() if NAME.fullmatch(path.name))
    return [path.name for path in arenas if _remove_if_orphan(path)]


def clear_orphans(directory: Path) -> None:
    """`remove_orphans`, with a line in the log for what was there. Raises `TransferError` where `directory` cannot be read."""
    try:
        orphans = remove_orphans(directory)
    except OSError as error:
        raise TransferError(f"transfer.dir = {directory} cannot be read: {error.strerror}") from error
    if orphans:
        log.info("removed arenas of processes that are gone: %s", ", ".join(orphans))


def full_fence() -> None:
    """Keep all loads and stores before the call before all those after it, on every processor.

    Python has no fence; a lock's release (no earlier access moves behind it) followed by an acquire (no later access moves
    before it) is one: a locked instruction on x86, whose plain loads and stores are ordered anyway but not its streaming
    copies, and a store-release with a load-acquire on ARM, which are not reordered with one another. Takes 0.2 us.
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


def _create_owned(directory: Path, owner: str) -> tuple[Path, int]:
    """A new, empty file that this process has locked.

    Between creating and locking it looks like an orphan. Whoever removes it then holds its lock or has unlinked it, so
    the loser sees it and takes another name.
    """
    spoken = re.sub(r"[^A-Za-z0-9_]+", "_", owner)[:64] or "_"
    for _ in range(CREATE_ATTEMPTS):
        path = directory / f"baton-{spoken}-{secrets.token_hex(8)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise TransferError(
                f"cannot create shared memory in transfer.dir = {directory}: {error.strerror}"
            ) from error
        if _lock(fd) and _names(path, fd):
            os.fchmod(fd, MODE)  # whatever the umask took away
            return path, fd
        os.close(fd)
    raise TransferError(
        f"{CREATE_ATTEMPTS} new files in {directory} were removed before they could be locked; start again"
    )


def _take_space(fd: int, nbytes: int, directory: Path) -> None:
    """Give the file its pages now: a page that is missing later would end the process with SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
            raise TransferError(f"cannot take {nbytes} bytes of {directory}: {error.strerror}") from error
        room = os.statvfs(directory)
        raise TransferError(
            f"shared memory is full: {nbytes} bytes wanted, {room.f_bavail * room.f_frsize} free in {directory} "
            f"({error.strerror}); lower transfer.arena_bytes or enlarge {directory} (docker run --shm-size)"
        ) from error


def _remove_if_orphan(path: Path) -> bool:
    """Remove one arena where its lock is free. Files that cannot be opened or belong to others are left alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        orphan = _is_ours(os.fstat(fd)) and _lock(fd) and _names(path, fd)
        if orphan:
            path.unlink(missing_ok=True)
        return orphan
    finally:
        os.close(fd)


def _lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the file's lock if it is free. It goes with the last descriptor and mapping of this opening of the file."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, fd: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_ours(status: os.stat_result) -> bool:
    """Whether it is a plain file that a process of this user made."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
