"""The `Transfer` of this host's memory: exports once, offers every way that works here, fetches by the first that does.

Life of a handle:
1. the owner copies the blocks into its `BlockStore` and writes an offer of each way into the handle, best first;
2. the reader goes through the offers: `Unusable` leads to the next one, `KVLost` and `WireError` hold for all;
3. the owner is told to release it; from then on every way answers with `KVLost` generation, or gone once the owner is closed.
"""

from __future__ import annotations

import logging
from importlib import import_module
from time import perf_counter
from typing import cast

from pipeline.config import TransferSettings
from pipeline.errors import KVLost, TransferError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink, BlockSource, Fetched, Transfer, TransferStats
from workers.transfers import offers
from workers.transfers.copies import CopyThreads
from workers.transfers.offers import AUTO, Offer
from workers.transfers.store import BlockStore, Export
from workers.transfers.way import Absent, Unusable, Way, WayFactory
from workers.transfers.ways.tcp.way import TcpWay

WAYS = {  # best first
    "cuda_ipc": "workers.transfers.ways.cuda_ipc",
    "shm": "workers.transfers.ways.shm",
    "nixl": "workers.transfers.ways.nixl.way",
    "tcp": "workers.transfers.ways.tcp.way",
}
ASK = "+ask"  # behind the name of a way: the bytes lie on the owner's GPU, so the owner is asked first. Workers before that pass it over
ON_DEVICE = {"cuda_ipc"}  # those that take the bytes from the owner's GPU
COPY_THREADS = 2

log = logging.getLogger(__name__)


def create_transfer(settings: TransferSettings, owner: str, *, exports: bool) -> Transfer:
    """The ways that `transfer.kind` names."""
    return BlockTransfer(settings, owner, exports=exports)


class BlockTransfer:
    """`workers.transfer.Transfer`. With `exports=False` (a decode worker) it has no store of its own."""

    def __init__(self, settings: TransferSettings, owner: str, *, exports: bool = True) -> None:
        self._settings = settings
        self._owner = owner
        self._is_exporting = exports
        self._copies = CopyThreads(COPY_THREADS, "block-copy")
        self._store = BlockStore(settings, owner, self._copies)
        self._ways = {kind: self._create(kind) for kind in WAYS if settings.kind in (kind, AUTO)}
        self._fetched = {kind: Fetched() for kind in self._ways}
        self._asking: TcpWay | None = None
        self._started = self._closed = False

    @property
    def owner(self) -> str:
        """The worker that its handles name."""
        return self._owner

    async def start(self, device: int | None = None) -> None:
        """Take the store's memory and what the ways need. Raises `TransferError`."""
        if device is None and self._settings.kind == AUTO:
            self._ways = {kind: way for kind, way in self._ways.items() if kind not in ON_DEVICE}
        if self._settings.verify and ON_DEVICE.issuperset(self._ways):
            raise TransferError(f"transfer.kind = {self._settings.kind} has no digests: set transfer.verify = false")
        if self._is_exporting:
            on_device = not ON_DEVICE.isdisjoint(self._ways) and not self._settings.verify
            await self._store.start(device, host=not ON_DEVICE.issuperset(self._ways), on_device=on_device)
        for kind, way in list(self._ways.items()):
            try:
                await way.start(device)
            except Unusable as error:
                if self._settings.kind != AUTO:
                    raise TransferError(f"transfer.kind = {kind}: {error}") from error
                level = logging.DEBUG if isinstance(error, Absent) else logging.WARNING
                log.log(level, "blocks do not move by %s here: %s", kind, error)
                await self._ways.pop(kind).close()
        if not self._ways:
            raise TransferError(f"blocks can move by none of {', '.join(WAYS)} here")
        self._started = True

    async def export(self, blocks: BlockSource) -> KVHandle:
        """Copy the blocks into the store. Waits, in order of arrival, until there is room for them.

        Raises `TransferError` where they can never fit, or where this transfer is closed or only fetches.
        """
        self._check_open()
        if not self._is_exporting:
            raise TransferError(f"the transfer of {self._owner} was started without a store: it only fetches")
        export = await self._store.export(blocks)
        transfer, params = offers.written(self._settings.kind, self._offers(export))
        return KVHandle(
            id=export.id,
            request_id=blocks.request_id,
            owner=self._owner,
            transfer=transfer,
            layout=blocks.layout,
            num_tokens=blocks.num_tokens,
            num_blocks=blocks.num_blocks,
            nbytes=blocks.nbytes,
            cached_tokens=blocks.cached_tokens,
            digest=export.digest,
            params=params,
        )

    async def fetch(self, handle: KVHandle, into: BlockSink) -> None:
        """Copy the blocks in by the first way that can be used from here.

        Raises `KVLost` (layout, gone, generation, digest), or `WireError` where the handle is not one of this transfer.
        """
        self._check_open()
        offered = offers.read(handle, tuple(WAYS))
        if (handle.layout, handle.nbytes) != (into.layout, into.nbytes):
            raise KVLost(
                f"handle {handle.id}: {handle.nbytes} bytes of layout {handle.layout!r}, "
                f"this engine expects {into.nbytes} of {into.layout!r}",
                reason="layout",
            )
        tried = []
        for offer in offered:
            try:
                await self._fetch_by(offer, handle, into)
            except Unusable as error:
                self._check_open()  # closed meanwhile: the handle may be sound
                tried.append(f"{offer.way}: {error}")
            else:
                return
        raise KVLost(f"handle {handle.id} cannot be fetched from here: {'; '.join(tried)}", reason="gone")

    async def release(self, handle_id: str) -> None:
        """Free an export: its handle is void from here on. Unknown ids are ignored."""
        self._store.release(handle_id)

    def stats(self) -> TransferStats:
        """Figures now. Bytes in use are those of whole slabs, since that is what is taken."""
        return TransferStats(
            handles=self._store.num_exports,
            bytes_used=self._store.bytes_used,
            bytes_free=self._store.bytes_free,
            exported_bytes_total=self._store.exported_bytes,
            fetched_bytes_total=sum(fetched.nbytes for fetched in self._fetched.values()),
            fetched={kind: fetched for kind, fetched in self._fetched.items() if fetched.handles},
        )

    async def close(self) -> None:
        """Let copies that run end, then give everything back, with whatever is still exported. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._store.refuse()
        try:
            for way in (*self._ways.values(), *filter(None, [self._asking])):
                await way.close()
            await self._copies.close()
        finally:
            self._store.close()

    def _create(self, kind: str) -> Way:
        create = cast(WayFactory, import_module(WAYS[kind]).create_way)
        return create(self._settings, self._store, self._copies, self._ask_to_fill, exports=self._is_exporting)

    def _check_open(self) -> None:
        if self._closed or not self._started:
            raise TransferError(f"the transfer of {self._owner} is {'closed' if self._closed else 'not started'}")

    def _offers(self, export: Export) -> list[Offer]:
        offered = ((kind, way.offer(export)) for kind, way in self._ways.items())
        return [Offer(way=named(kind, params), params=params) for kind, params in offered if params is not None]

    async def _ask_to_fill(self, handle: KVHandle) -> None:
        """See `AskToFill`. TCP is how processes that move blocks speak with each other, also where bytes take another way."""
        for offer in offers.read(handle, tuple(WAYS)):
            if offer.way == "tcp":
                self._asking = self._asking or TcpWay(self._settings, self._store, self._copies, exports=False)
                return await self._asking.ask_to_fill(handle, offer.params)
        raise Unusable("its bytes lie on the owner's GPU, which cannot be asked for them without tcp")

    async def _fetch_by(self, offer: Offer, handle: KVHandle, into: BlockSink) -> None:
        kind = offer.way.removesuffix(ASK)
        way = self._ways.get(kind)
        if way is None:
            raise Unusable(f"not in use here (transfer.kind = {self._settings.kind})")
        start_s = perf_counter()
        await way.fetch(handle, offer.params, into)
        so_far = self._fetched[kind]
        self._fetched[kind] = Fetched(
            handles=so_far.handles + 1,
            nbytes=so_far.nbytes + handle.nbytes,
            seconds=so_far.seconds + perf_counter() - start_s,
        )
        log.debug("handle %s fetched by %s", handle.id, kind)


def named(kind: str, params: dict[str, object]) -> str:
    """The name of an offer: of one whose bytes are not there yet a worker that cannot ask for them must not know it."""
    return kind if params.get("is_filled", True) else kind + ASK
