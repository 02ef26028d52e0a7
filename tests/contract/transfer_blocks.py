"""Blocks as plain numpy bytes, and the implementations that the transfer suite runs against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import TransferSettings
from workers.transfer import Transfer
from workers.transfers.block_transfer import BlockTransfer

LAYOUT = "test-layout"
SLAB = 65_536
ARENA = 64 * SLAB  # 4 MiB: exports of more than a quarter of it are copied in a thread


class Bytes:
    """A `BlockSource` of random bytes, different for each seed."""

    def __init__(self, nbytes: int, seed: int = 0, *, layout: str = LAYOUT, request_id: str = "r1") -> None:
        self.request_id = request_id
        self.layout = layout
        self.num_tokens = nbytes
        self.num_blocks = 1
        self.nbytes = nbytes
        self.cached_tokens = 0
        self.data: npt.NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)

    def gather(self, out: memoryview) -> None:
        assert (out.format, out.nbytes, out.readonly) == ("B", self.nbytes, False)
        np.copyto(np.frombuffer(out, dtype=np.uint8), self.data)


class Sink:
    """A `BlockSink` that keeps what it was given."""

    def __init__(self, nbytes: int, *, layout: str = LAYOUT) -> None:
        self.layout = layout
        self.nbytes = nbytes
        self.touched = False
        self.data: npt.NDArray[np.uint8] = np.zeros(nbytes, dtype=np.uint8)

    def scatter(self, data: memoryview) -> None:
        assert (data.format, data.nbytes) == ("B", self.nbytes)
        self.touched = True
        np.copyto(self.data, np.frombuffer(data, dtype=np.uint8))


class Factory(Protocol):
    """Makes a transfer that is not started. All that one test makes can reach one another through `place`."""

    def __call__(self, place: Path, owner: str, *, verify: bool = True, exports: bool = True) -> Transfer: ...


def shm(place: Path, owner: str, *, verify: bool = True, exports: bool = True) -> BlockTransfer:
    settings = TransferSettings(dir=str(place), arena_bytes=ARENA, slab_bytes=SLAB, verify=verify)
    return BlockTransfer(settings, owner, exports=exports)


TRANSFERS: dict[str, Callable[..., Transfer]] = {"shm": shm}
