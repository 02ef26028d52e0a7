"""The contract of a transfer: moves the blocks of a request from the engine that computed them to the one that decodes.

Who owns what: the exporting side owns the exported bytes until `release`. A handle is a claim check: it names the place,
its generation and the layout; the fetching side copies and compares, and raises `KVLost` rather than use wrong bytes.
The engine says where the blocks are in its memory (`BlockSource`, `BlockSink`); the transfer never learns what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import msgspec

from pipeline.config import TransferSettings
from pipeline.protocol import KVHandle


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Memory of a GPU from `address` on. The copies of this process's `device` reach it; it may be another process's or device's."""

    device: int
    address: int
    nbytes: int


Memory = memoryview | DeviceBytes  # a view is of format "B"


def host(memory: Memory) -> memoryview:
    """What an engine gets whose blocks lie in host memory. Raises `TypeError` for anything else."""
    if isinstance(memory, memoryview):
        return memory
    raise TypeError(f"{memory} was given to an engine whose blocks lie in host memory")


def part(memory: Memory, offset: int, nbytes: int) -> Memory:
    """`nbytes` bytes of it from `offset` on."""
    if isinstance(memory, memoryview):
        return memory[offset : offset + nbytes]
    return DeviceBytes(memory.device, memory.address + offset, nbytes)


class BlockSource(Protocol):
    """Blocks to export, in order of the request's block table."""

    device: int | None  # the GPU that they lie on, an ordinal of this process; None: host memory
    request_id: str
    layout: str  # fingerprint, copied into the handle
    num_tokens: int  # tokens whose keys and values the blocks hold
    num_blocks: int
    nbytes: int  # of all blocks, gathered
    cached_tokens: int

    def gather(self, out: Memory) -> None:
        """Write all blocks, in order and without gaps, into `out` (length `nbytes`): host memory, or memory of `device`."""
        ...


class BlockSink(Protocol):
    """Blocks of the fetching engine that take the bytes in."""

    device: int | None  # as of a `BlockSource`
    layout: str
    nbytes: int

    def scatter(self, data: Memory) -> None:
        """Read all blocks, in order and without gaps, from `data` (length `nbytes`): host memory, or what `device` reaches."""
        ...


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """What came in by one way. `seconds`: the times of all fetches added up, which may overlap."""

    handles: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class TransferStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a transfer."""

    handles: int = 0  # exported, not released
    bytes_used: int = 0
    bytes_free: int = 0
    exported_bytes_total: int = 0
    fetched_bytes_total: int = 0
    fetched: dict[str, Fetched] = {}  # by way, those that were used


class Transfer(Protocol):
    """See the module's docstring. Methods are called from one event loop; long copies leave it free (a thread)."""

    @property
    def owner(self) -> str:
        """The worker that its handles name."""
        ...

    async def start(self, device: int | None = None) -> None:
        """Take what is needed (memory, sockets). `device`: the GPU that the engine's blocks lie on.

        Raises `TransferError` naming what is missing and how to mend it.
        """
        ...

    async def export(self, blocks: BlockSource) -> KVHandle:
        """Publish the blocks; the handle is valid at once. Waits while there is no room for them.

        Raises `TransferError` where they can never fit.
        """
        ...

    async def fetch(self, handle: KVHandle, into: BlockSink) -> None:
        """Copy the blocks in. Raises `KVLost` with reason gone, generation, layout or digest; `into` is then undefined."""
        ...

    async def release(self, handle_id: str) -> None:
        """Free an export. Unknown ids are ignored."""
        ...

    def stats(self) -> TransferStats:
        """Figures now; never blocks."""
        ...

    async def close(self) -> None:
        """Give everything back. May be called twice."""
        ...


class TransferFactory(Protocol):
    """What `workers.transfers.block_transfer` offers as `create_transfer`; it is imported where blocks are moved."""

    def __call__(self, settings: TransferSettings, owner: str, *, exports: bool) -> Transfer:
        """A transfer that has not started; `exports` False takes no memory for blocks of its own."""
        ...


def load_transfer(settings: TransferSettings, owner: str, *, exports: bool) -> Transfer:
    """The transfer that the settings name, not yet started. `owner` is the worker's name."""
    create = cast(TransferFactory, import_module("workers.transfers.block_transfer").create_transfer)
    return create(settings, owner, exports=exports)
