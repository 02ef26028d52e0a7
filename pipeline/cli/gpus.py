"""The GPUs of this machine that `baton autoscale` deals out, each to one worker at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path


class Gpus:
    """Which pool has which. Shared by the supervisors of all pools of this process; another process that deals out the same ones, for
    another Redis perhaps, is kept off by a lock on a file each, which the kernel frees when its holder ends."""

    def __init__(self, names: Sequence[str], locks: Path | None = None) -> None:
        self.names = names
        self._locks = locks
        self._taken: dict[str, tuple[str, int]] = {}  # the pool that has it, and the file that is locked for it

    def take(self, pool: str, count: int) -> tuple[str, ...] | None:
        """So many that are free; None while there are not as many. Without a list nothing is dealt out."""
        if not self.names or not count:
            return ()
        found = []
        for gpu in self.names:
            if gpu not in self._taken and (file := self._lock(gpu, fcntl.LOCK_EX)) is not None:
                self._taken[gpu] = (pool, file)
                found.append(gpu)
                if len(found) == count:
                    return tuple(found)
        self.give_back(found)
        return None

    def give_back(self, gpus: Iterable[str]) -> None:
        """Their worker has ended."""
        for gpu in gpus:
            _, file = self._taken.pop(gpu)
            os.close(file)

    def of_others(self, pool: str) -> int:
        """How many other pools have, here or in another process."""
        elsewhere = 0
        for gpu in self.names:
            if gpu not in self._taken:
                file = self._lock(gpu, fcntl.LOCK_SH)  # shared: who only looks keeps off nobody who looks
                elsewhere += file is None
                if file is not None:
                    os.close(file)
        return elsewhere + sum(owner != pool for owner, _ in self._taken.values())

    def _lock(self, gpu: str, how: int) -> int | None:
        """None where somebody else has it, or it cannot be known."""
        file = None
        try:
            folder = self._locks or Path(tempfile.gettempdir())
            file = _opened(folder / f"baton-gpu-{gpu.replace('/', '_')}.lock")
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except OSError:
            if file is not None:
                os.close(file)
            return None
        return file


def _opened(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # another user's: it may be locked, though not made
        return os.open(path, os.O_RDONLY)
    with contextlib.suppress(PermissionError):
        os.fchmod(file, 0o644)  # whatever the umask: other users lock it, too
    return file
