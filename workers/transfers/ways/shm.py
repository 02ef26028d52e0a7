"""The way `shm`: the reader maps the owner's arena and copies out of it. For processes of one host and one user.

That both are on one host is proved, not believed: the arena of the offer, with the random number in its name and header, is
in the reader's own directory of shared memory.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.config import TransferSettings
from pipeline.errors import KVLost, TransferError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink
from workers.transfers.arena import NAME, PeerArena, Unreadable, clear_orphans
from workers.transfers.copies import CopyThreads
from workers.transfers.pins import pin
from workers.transfers.slabs import Run
from workers.transfers.store import BlockStore, Export, digest_of
from workers.transfers.way import AskToFill, Unusable, Way, read_params

MAX_PEERS = 16  # arenas of others that stay mapped; the least recently read goes first

SlabNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ShmParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The offer: which bytes of which arena. A name, never a path: a reader looks in its own directory only."""

    arena: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}\\Z")]
    first: SlabNumber
    count: SlabNumber
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    is_filled: bool = True  # False: the bytes lie on the owner's GPU, which has to be asked for them


def create_way(
    settings: TransferSettings, store: BlockStore, copies: CopyThreads, ask_to_fill: AskToFill, *, exports: bool
) -> Way:
    """Shared memory in `transfer.dir`."""
    return ShmWay(Path(settings.dir), copies, ask_to_fill)


class ShmWay:
    """`workers.transfers.way.Way` over the arenas in a directory."""

    def __init__(self, directory: Path, copies: CopyThreads, ask_to_fill: AskToFill) -> None:
        self._dir = directory
        self._copies = copies
        self._ask_to_fill = ask_to_fill
        self._device: int | None = None
        self._peers: dict[str, PeerArena] = {}  # by name, the least recently read first

    async def start(self, device: int | None) -> None:
        """Remove what crashed processes left. Raises `Unusable` where there is no such directory."""
        self._device = device
        try:
            await asyncio.to_thread(clear_orphans, self._dir)
        except TransferError as error:
            raise Unusable(str(error)) from error

    def offer(self, export: Export) -> dict[str, Any] | None:
        """Where the export lies."""
        if (placed := export.host) is None:
            return None
        first, count = placed.run
        params = ShmParams(
            arena=placed.arena, first=first, count=count, generation=placed.generation, is_filled=export.device is None
        )
        offer: dict[str, Any] = msgspec.to_builtins(params)
        return offer

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Copy the blocks out of their owner's arena; the owner need not live any more. See `Way.fetch`."""
        offer = read_params(handle, params, ShmParams)
        try:
            peer = self._peer(offer.arena)
        except Unreadable as error:
            raise Unusable(str(error)) from error
        if not offer.is_filled:
            await self._ask_to_fill(handle)
        await self._copies.copy(handle.nbytes, lambda: _scatter(peer, offer, handle, into), device=into.device)

    async def close(self) -> None:
        """Let the mappings go; they end with the last copy out of them."""
        self._peers.clear()

    def _peer(self, name: str) -> PeerArena:
        """The mapping of an arena. Those whose file is gone end here, else they would hold memory that has no name."""
        self._peers = {known: peer for known, peer in self._peers.items() if peer.is_current()}
        peer = self._peers.pop(name, None) or self._opened(name)
        self._peers[name] = peer
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return peer

    def _opened(self, name: str) -> PeerArena:
        """Map it. Where there is a GPU it is pinned in a thread: until then copies to the GPU are slower."""
        peer = PeerArena.open(self._dir, name)
        if self._device is not None:
            threading.Thread(target=_pin, args=(weakref.ref(peer), self._device, name), daemon=True).start()
        return peer


def _pin(peer: weakref.ref[PeerArena], device: int, name: str) -> None:
    """Until the mapping ends. The thread does not hold it longer than it takes."""
    if (mapped := peer()) is not None:
        unpin = pin(mapped.whole(), device, f"arena {name}", read_only=True)
        weakref.finalize(mapped, unpin).atexit = False


def _scatter(peer: PeerArena, offer: ShmParams, handle: KVHandle, into: BlockSink) -> None:
    """Copy and prove it: the generation before, the digest of what is about to be copied, the generation after.

    Bytes that change between digest and copy change after a new generation, which the last check sees.
    """
    run = Run(offer.first, offer.count)
    if not peer.covers(run, handle.nbytes):
        raise KVLost(f"handle {handle.id} names slabs that {offer.arena} has not", reason="gone")
    _check_generation(peer, offer, handle)
    data = peer.view(run, handle.nbytes)
    if handle.digest is not None and digest_of(data) != handle.digest:
        _check_generation(peer, offer, handle)
        raise KVLost(f"handle {handle.id}: the bytes in {offer.arena} are not those exported", reason="digest")
    into.scatter(data)
    _check_generation(peer, offer, handle)


def _check_generation(peer: PeerArena, offer: ShmParams, handle: KVHandle) -> None:
    if not peer.holds(Run(offer.first, offer.count), offer.generation):
        raise KVLost(
            f"handle {handle.id}: its slabs in {offer.arena} were freed or are used for others", reason="generation"
        )
