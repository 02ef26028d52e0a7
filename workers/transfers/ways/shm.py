"""The way `shm`: the reader maps the owner's arena and copies out of it. For processes of one host and one user.

That both are on one host is proved, not believed: the arena of the offer, with the random number in its name and header, is
in the reader's own directory of shared memory.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.config import TransferSettings
from pipeline.errors import KVLost, TransferError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink
from workers.transfers.arena import NAME, PeerArena, Unreadable, clear_orphans
from workers.transfers.copies import CopyThreads
from workers.transfers.slabs import Run
from workers.transfers.store import BlockStore, Export, digest_of
from workers.transfers.way import Unusable, Way, read_params

MAX_PEERS = 16  # arenas of others that stay mapped; the least recently read goes first

SlabNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ShmParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The offer: which bytes of which arena. A name, never a path: a reader looks in its own directory only."""

    arena: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}\\Z")]
    first: SlabNumber
    count: SlabNumber
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


def create_way(settings: TransferSettings, store: BlockStore, copies: CopyThreads, *, exports: bool) -> Way:
    """Shared memory in `transfer.dir`."""
    return ShmWay(Path(settings.dir), copies)


class ShmWay:
    """`workers.transfers.way.Way` over the arenas in a directory."""

    def __init__(self, directory: Path, copies: CopyThreads) -> None:
        self._dir = directory
        self._copies = copies
        self._peers: dict[str, PeerArena] = {}  # by name, the least recently read first

    async def start(self) -> None:
        """Remove what crashed processes left. Raises `Unusable` where there is no such directory."""
        try:
            await asyncio.to_thread(clear_orphans, self._dir)
        except TransferError as error:
            raise Unusable(str(error)) from error

    def offer(self, export: Export) -> dict[str, Any]:
        """Where the export lies."""
        run = export.run
        params = ShmParams(arena=export.arena, first=run.first, count=run.length, generation=export.generation)
        return msgspec.structs.asdict(params)

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Copy the blocks out of their owner's arena; the owner need not live any more. See `Way.fetch`."""
        offer = read_params(handle, params, ShmParams)
        try:
            peer = self._peer(offer.arena)
        except Unreadable as error:
            raise Unusable(str(error)) from error
        await self._copies.copy(handle.nbytes, lambda: _scatter(peer, offer, handle, into))

    async def close(self) -> None:
        """Let the mappings go; they end with the last copy out of them."""
        self._peers.clear()

    def _peer(self, name: str) -> PeerArena:
        """The mapping of an arena. Those whose file is gone end here, else they would hold memory that has no name."""
        self._peers = {known: peer for known, peer in self._peers.items() if peer.is_current()}
        peer = self._peers.pop(name, None) or PeerArena.open(self._dir, name)
        self._peers[name] = peer
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return peer


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
