"""The contract of a way: how the bytes that one process exported get into the blocks of another one.

A process exports blocks once, into its `BlockStore`. Each way that it serves adds an offer to the handle: what a reader needs
who takes this way. A reader tries the offers in their order, best first:
- a way that cannot be used from where it stands raises `Unusable`, and the next one is tried;
- a handle that is void (`KVLost`) or wrong (`WireError`) is so by every way: none is tried after it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from pipeline.config import TransferSettings
from pipeline.errors import WireError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink
from workers.transfers.copies import CopyThreads
from workers.transfers.store import BlockStore, Export

P = TypeVar("P", bound=msgspec.Struct)


class Unusable(Exception):
    """This way cannot be used here, or not to this owner; the message says why."""


class Absent(Unusable):
    """This machine has not what the way is for, which is no news to anybody: `auto` goes on without a word."""


class Way(Protocol):
    """See the module's docstring. Used from one event loop."""

    async def start(self, device: int | None) -> None:
        """Take what is needed; the store has started. `device`: the GPU that the engine's blocks lie on.

        Raises `Unusable` where this machine has not what it takes, `TransferError` where a setting is wrong, naming it.
        """
        ...

    def offer(self, export: Export) -> dict[str, Any] | None:
        """What a reader needs, for the handle; None where this export cannot be had this way. Called by an exporting process only."""
        ...

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Copy the blocks in; `params` are what `offer` gave, from outside. Layout and size are known to be right.

        Raises `Unusable`, `KVLost` (gone, generation, digest), or `WireError` naming the field of `params`.
        """
        ...

    async def close(self) -> None:
        """Give everything back; fetches that run may fail. May be called twice."""
        ...


AskToFill = Callable[[KVHandle], Awaitable[None]]
"""Has the owner of a handle, whose bytes lie on its GPU, put them into host memory. Raises `Unusable`, `KVLost` or `WireError`."""


class WayFactory(Protocol):
    """What a module of `workers.transfers.ways` offers as `create_way`."""

    def __call__(
        self,
        settings: TransferSettings,
        store: BlockStore,
        copies: CopyThreads,
        ask_to_fill: AskToFill,
        *,
        exports: bool,
    ) -> Way:
        """A way that has not started. `exports`: it serves what is in `store`; else it only reads from others."""
        ...


def read_params(handle: KVHandle, params: dict[str, Any], kind: type[P]) -> P:
    """The offer as the way that made it knows it. Raises `WireError` with the field."""
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise WireError(f"handle {handle.id}: params: {error}") from error
