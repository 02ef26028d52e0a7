"""The `shm` transfer: blocks pass between processes of one host through a reused arena in /dev/shm, one copy on each side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import xxhash

from pipeline.config import TransferSettings
from pipeline.errors import KVLost, TransferError, WireError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink, BlockSource, Transfer, TransferStats
from workers.transfers.arena import NAME, Arena, PeerArena, Unreadable, remove_orphans, slabs_of
from workers.transfers.slabs import Run, SlabMap

KIND = "shm"
INLINE_BYTES = 1_048_576  # a copy up to this size takes less time than the hop to a thread and back
MAX_PEERS = 16  # arenas of others that stay mapped; the least recently read goes first
COPY_THREADS = 2

log = logging.getLogger(__name__)
T = TypeVar("T")


SlabNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ShmParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`params` of a handle: which bytes of which arena. A name, never a path: a reader looks in its own directory only."""

    arena: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}\\Z")]
    first: SlabNumber
    count: SlabNumber
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


def create_transfer(settings: TransferSettings, owner: str, *, exports: bool) -> Transfer:
    """Shared memory as configured."""
    return ShmTransfer(settings, owner, exports=exports)


class ShmTransfer:
    """`workers.transfer.Transfer` over shared memory. With `exports=False` (a decode worker) it has no arena of its own."""

    def __init__(self, settings: TransferSettings, owner: str, *, exports: bool = True) -> None:
        self._settings = settings
        self._owner = owner
        self._with_arena = exports
        self._dir = Path(settings.dir)
        self._arena: Arena | None = None
        self._slabs = SlabMap(0)
        self._exports: dict[str, Run] = {}
        self._turn = asyncio.Lock()  # exports take their slabs in order of arrival
        self._room = asyncio.Event()  # something was freed since the first in turn looked
        self._peers: dict[str, PeerArena] = {}  # by name, the least recently read first
        self._threads = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="shm-copy")
        self._started = self._closed = False
        self._exported_bytes = self._fetched_bytes = 0

    async def start(self) -> None:
        """Remove what crashed processes left, then take the arena's memory. Raises `TransferError`."""
        setting_up = asyncio.ensure_future(asyncio.to_thread(self._set_up))
        try:
            self._arena = await asyncio.shield(setting_up)
        except asyncio.CancelledError:  # the thread goes on: what it makes is removed by `close`
            await asyncio.wait([setting_up])
            self._arena = None if setting_up.exception() else setting_up.result()
            raise
        if self._arena is not None:
            self._slabs = SlabMap(self._arena.num_slabs)
        self._started = True

    async def export(self, blocks: BlockSource) -> KVHandle:
        """Copy the blocks into the arena. Waits, in order of arrival, until enough neighbouring slabs are free.

        Raises `TransferError` where the whole arena is too small, or where this transfer is closed or has no arena.
        """
        arena = self._own_arena()
        run = await self._take(self._slabs_for(blocks, arena))
        try:
            generation = arena.raise_generation(run)
            digest = await self._copy(blocks.nbytes, lambda: self._gather(arena, run, blocks))
            self._check_open()
        except BaseException:
            self._free(run)
            raise
        handle_id = uuid.uuid4().hex
        self._exports[handle_id] = run
        self._exported_bytes += blocks.nbytes
        params = ShmParams(arena=arena.name, first=run.first, count=run.length, generation=generation)
        return KVHandle(
            id=handle_id,
            request_id=blocks.request_id,
            owner=self._owner,
            transfer=KIND,
            layout=blocks.layout,
            num_tokens=blocks.num_tokens,
            num_blocks=blocks.num_blocks,
            nbytes=blocks.nbytes,
            cached_tokens=blocks.cached_tokens,
            digest=digest,
            params=msgspec.to_builtins(params),
        )

    async def fetch(self, handle: KVHandle, into: BlockSink) -> None:
        """Copy the blocks out of their owner's arena, which need not live any more.

        Raises `KVLost` (layout, gone, generation, digest), or `WireError` where the handle is not one of this transfer.
        """
        self._check_open()
        if handle.transfer != KIND:
            raise WireError(f"handle {handle.id} is for transfer {handle.transfer!r}, this is {KIND!r}")
        if (handle.layout, handle.nbytes) != (into.layout, into.nbytes):
            raise KVLost(
                f"handle {handle.id}: {handle.nbytes} bytes of layout {handle.layout!r}, "
                f"this engine expects {into.nbytes} of {into.layout!r}",
                reason="layout",
            )
        params = _read_params(handle)
        try:
            peer = self._peer(params.arena)
        except Unreadable as error:
            raise KVLost(f"handle {handle.id}: {error}", reason="gone") from error
        await self._copy(handle.nbytes, lambda: _scatter(peer, params, handle, into))
        self._fetched_bytes += handle.nbytes

    async def release(self, handle_id: str) -> None:
        """Free an export: its generation is void from here on. Unknown ids are ignored."""
        run = self._exports.pop(handle_id, None)
        if run is not None:
            self._free(run)

    def stats(self) -> TransferStats:
        """Figures now. Bytes are those of whole slabs, since that is what is taken."""
        slab_bytes = self._arena.slab_bytes if self._arena else 0
        return TransferStats(
            handles=len(self._exports),
            bytes_used=(self._slabs.num_slabs - self._slabs.num_free) * slab_bytes,
            bytes_free=self._slabs.num_free * slab_bytes,
            exported_bytes_total=self._exported_bytes,
            fetched_bytes_total=self._fetched_bytes,
        )

    async def close(self) -> None:
        """Let copies that run end, then remove the arena, with whatever is still exported. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._room.set()
        try:
            await asyncio.to_thread(self._threads.shutdown)
        finally:
            arena, self._arena = self._arena, None
            self._slabs = SlabMap(0)
            self._exports.clear()
            self._peers.clear()
            if arena is not None:
                arena.close()

    def _set_up(self) -> Arena | None:
        try:
            orphans = remove_orphans(self._dir)
        except OSError as error:
            raise TransferError(f"transfer.dir = {self._dir} cannot be read: {error.strerror}") from error
        if orphans:
            log.info("removed arenas of processes that are gone: %s", ", ".join(orphans))
        if not self._with_arena:
            return None
        return Arena.create(
            self._dir, self._owner, arena_bytes=self._settings.arena_bytes, slab_bytes=self._settings.slab_bytes
        )

    def _check_open(self) -> None:
        if self._closed or not self._started:
            raise TransferError(f"the shm transfer of {self._owner} is {'closed' if self._closed else 'not started'}")

    def _own_arena(self) -> Arena:
        self._check_open()
        if self._arena is None:
            raise TransferError(f"the shm transfer of {self._owner} was started without an arena: it only fetches")
        return self._arena

    def _slabs_for(self, blocks: BlockSource, arena: Arena) -> int:
        count = slabs_of(blocks.nbytes, arena.slab_bytes)
        if count > arena.num_slabs:
            raise TransferError(
                f"request {blocks.request_id}: its {blocks.nbytes} bytes of blocks can never fit into an arena of "
                f"{arena.num_slabs * arena.slab_bytes}; raise transfer.arena_bytes (now {self._settings.arena_bytes})"
            )
        return count

    async def _take(self, count: int) -> Run:
        """`count` neighbouring slabs, once they are free. Who comes later waits behind, else a long run might never be."""
        async with self._turn:
            while True:
                self._check_open()
                if (run := self._slabs.take(count)) is not None:
                    return run
                self._room.clear()
                await self._room.wait()

    def _free(self, run: Run) -> None:
        if self._arena is None:  # closed meanwhile
            return
        self._arena.raise_generation(run)
        self._slabs.give_back(run)
        self._room.set()

    def _gather(self, arena: Arena, run: Run, blocks: BlockSource) -> str | None:
        data = arena.view(run, blocks.nbytes)
        blocks.gather(data)
        return _digest(data) if self._settings.verify else None

    def _peer(self, name: str) -> PeerArena:
        """The mapping of an arena. Those whose file is gone end here, else they would hold memory that has no name."""
        self._peers = {known: peer for known, peer in self._peers.items() if peer.is_current()}
        peer = self._peers.pop(name, None) or PeerArena.open(self._dir, name)
        self._peers[name] = peer
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return peer

    async def _copy(self, nbytes: int, work: Callable[[], T]) -> T:
        """Run a copy: a short one here, a long one in a thread so that the loop stays free.

        A caller that is cancelled still waits for the thread: it must not go on in memory that is someone else's by then.
        """
        if nbytes <= INLINE_BYTES:
            return work()
        copy = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(copy)
        except asyncio.CancelledError:
            await _wait_out(copy)
            raise


async def _wait_out(copy: asyncio.Future[T]) -> None:
    """Wait for the end of a copy, whatever it is, through further cancellations."""
    while not copy.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([copy])
    if (error := copy.exception()) is not None:
        log.debug("a copy whose caller was cancelled failed: %s", error)


def _read_params(handle: KVHandle) -> ShmParams:
    try:
        return msgspec.convert(handle.params, ShmParams)
    except msgspec.ValidationError as error:
        raise WireError(f"handle {handle.id}: params: {error}") from error


def _scatter(peer: PeerArena, params: ShmParams, handle: KVHandle, into: BlockSink) -> None:
    """Copy and prove it: the generation before, the digest of what is about to be copied, the generation after.

    Bytes that change between digest and copy change after a new generation, which the last check sees.
    """
    run = Run(params.first, params.count)
    if not peer.covers(run, handle.nbytes):
        raise KVLost(f"handle {handle.id} names slabs that {params.arena} has not", reason="gone")
    _check_generation(peer, params, handle)
    data = peer.view(run, handle.nbytes)
    if handle.digest is not None and _digest(data) != handle.digest:
        _check_generation(peer, params, handle)
        raise KVLost(f"handle {handle.id}: the bytes in {params.arena} are not those exported", reason="digest")
    into.scatter(data)
    _check_generation(peer, params, handle)


def _check_generation(peer: PeerArena, params: ShmParams, handle: KVHandle) -> None:
    if not peer.holds(Run(params.first, params.count), params.generation):
        raise KVLost(
            f"handle {handle.id}: its slabs in {params.arena} were freed or are used for others", reason="generation"
        )


def _digest(data: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)
