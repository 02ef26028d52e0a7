"""The way `cuda_ipc`: the reader opens the owner's GPU memory and copies out of it. For two processes of one host.

The owner has gathered a request's blocks into one run on its GPU; the reader's engine copies it over, piece by piece, into staging
memory, and scatters it from there. That both are on one host is proved by the owner's ledger, as by its arena for `shm`; that the GPUs
reach each other shows when the memory is opened. GPU memory goes with its process, so the owner must live until the copy has ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.config import TransferSettings
from pipeline.errors import KVLost
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink, DeviceBytes
from workers.transfers.arena import LEDGER_MAGIC, NAME, PeerArena, Unreadable
from workers.transfers.copies import CopyThreads
from workers.transfers.slabs import Run
from workers.transfers.store import BlockStore, Export
from workers.transfers.way import AskToFill, Unusable, Way, read_params
from workers.transfers.ways.shm import SlabNumber


class CudaIpcParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The offer: which slabs of which ledger. What opens the memory is in the ledger: only this user's processes can write it."""

    ledger: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}\\Z")]
    first: SlabNumber
    count: SlabNumber
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class Peer:
    """An owner's GPU memory as this process sees it."""

    ledger: PeerArena
    address: int
    is_own: bool


def create_way(
    settings: TransferSettings, store: BlockStore, copies: CopyThreads, ask_to_fill: AskToFill, *, exports: bool
) -> Way:
    """Memory of the GPUs of this host."""
    return CudaIpcWay(Path(settings.dir), store, copies)


class CudaIpcWay:
    """`workers.transfers.way.Way` over GPU memory."""

    def __init__(self, directory: Path, store: BlockStore, copies: CopyThreads) -> None:
        self._dir = directory
        self._store = store
        self._copies = copies
        self._device: int | None = None
        self._peers: dict[str, Peer] = {}  # by the name of the ledger
        self._uses: Counter[str] = Counter()  # copies that run, by the name of the ledger
        self._lock = threading.Lock()  # copies run in threads

    async def start(self, device: int | None) -> None:
        """Raises `Unusable` where the blocks are not on a GPU."""
        if device is None:
            raise Unusable("the blocks of this engine are not on a GPU")
        self._device = device

    def offer(self, export: Export) -> dict[str, Any] | None:
        """Where the export lies, if it lies on the GPU."""
        if (placed := export.device) is None:
            return None
        run = placed.run
        params = CudaIpcParams(ledger=placed.arena, first=run.first, count=run.length, generation=placed.generation)
        return msgspec.structs.asdict(params)

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Copy the blocks over from their owner, which must live. See `Way.fetch`."""
        offer = read_params(handle, params, CudaIpcParams)
        await self._copies.run(lambda: self._scatter(offer, handle, into))

    async def close(self) -> None:
        """Let go of the memory of others; the copies out of it have ended. May be called twice."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            self._let_go(peer)

    def _scatter(self, offer: CudaIpcParams, handle: KVHandle, into: BlockSink) -> None:
        """Copy, and look at the generation before and after: what was freed meanwhile is void."""
        assert self._device is not None
        with self._used(offer) as peer:
            self._copy(peer, offer, handle, self._device, into)

    def _copy(self, peer: Peer, offer: CudaIpcParams, handle: KVHandle, device: int, into: BlockSink) -> None:
        from workers import cuda

        run = Run(offer.first, offer.count)
        if not peer.ledger.covers(run, handle.nbytes):
            raise KVLost(f"handle {handle.id} names slabs that {offer.ledger} has not", reason="gone")
        _check_generation(peer, offer, handle)
        start = peer.address + run.first * peer.ledger.slab_bytes
        try:
            into.scatter(DeviceBytes(device, start, handle.nbytes))
        except (cuda.CudaError, RuntimeError) as error:  # PyTorch's own
            raise Unusable(f"ledger {offer.ledger}: {error}") from error
        _check_generation(peer, offer, handle)
        if not peer.ledger.is_owned():  # its memory may have gone while it was read
            raise Unusable(f"ledger {offer.ledger}: its owner ended during the copy")

    @contextlib.contextmanager
    def _used(self, offer: CudaIpcParams) -> Iterator[Peer]:
        with self._lock:
            peer = self._peer(offer)
            self._uses[offer.ledger] += 1
        try:
            yield peer
        finally:
            with self._lock:
                self._uses[offer.ledger] -= 1

    def _peer(self, offer: CudaIpcParams) -> Peer:
        """The owner's memory, opened once. Raises `Unusable` where the owner is elsewhere, gone, or out of reach."""
        for name, known in list(self._peers.items()):
            if not known.ledger.is_current() and not self._uses[name]:  # its owner ended
                self._let_go(self._peers.pop(name))
        peer = self._peers.get(offer.ledger) or self._opened(offer)
        self._peers[offer.ledger] = peer
        if not peer.ledger.is_owned():
            raise Unusable(f"ledger {offer.ledger}: its owner is gone, and its GPU memory with it")
        return peer

    def _opened(self, offer: CudaIpcParams) -> Peer:
        from workers import cuda

        assert self._device is not None
        try:
            ledger = PeerArena.open(self._dir, offer.ledger, LEDGER_MAGIC)
            own = self._store.device
            if own is not None and own.name == offer.ledger:  # a process cannot open its own memory
                return Peer(ledger, own.address, is_own=True)
            return Peer(ledger, cuda.open_ipc(self._device, ledger.note()), is_own=False)
        except (Unreadable, cuda.CudaError) as error:
            raise Unusable(str(error)) from error

    def _let_go(self, peer: Peer) -> None:
        from workers import cuda

        if peer.is_own or self._device is None:
            return
        with contextlib.suppress(cuda.CudaError):  # it went with its owner
            cuda.close_ipc(self._device, peer.address)


def _check_generation(peer: Peer, offer: CudaIpcParams, handle: KVHandle) -> None:
    if not peer.ledger.holds(Run(offer.first, offer.count), offer.generation):
        raise KVLost(f"handle {handle.id}: its slabs on the GPU were freed or are used for others", reason="generation")
