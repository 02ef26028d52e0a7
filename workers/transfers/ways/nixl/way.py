"""The way `nixl`: the reader's NIXL agent reads the owner's arena. Between hosts with RDMA the owner's processor has no part in it.

Life of a fetch:
1. wait in turn for staging memory, which the reader's agent has registered;
2. meet the owner's agent by the metadata in the handle, once;
3. read the bytes, then the arena's header and the generations of the slabs. A generation never comes back, so the slabs that still have the
   handle's had it from the export on: what was read in between is the handle's. The header's random number says that it is this arena;
4. compare the digest, where the handle has one, and scatter.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash

from pipeline.config import NixlSettings, TransferSettings
from pipeline.errors import KVLost, WireError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink
from workers.transfers.arena import GENERATIONS_OFFSET, HEADER, NAME, Header, slabs_of
from workers.transfers.copies import CopyThreads
from workers.transfers.slabs import Run
from workers.transfers.store import BlockStore, Export, digest_of
from workers.transfers.way import Absent, AskToFill, Unusable, Way, read_params
from workers.transfers.ways.nixl.agent import Agent, Memory, Piece, load_nixl
from workers.transfers.ways.nixl.peers import Peer, Peers
from workers.transfers.ways.staging import Piece as StagingPiece
from workers.transfers.ways.staging import Staging

RDMA_DEVICES = Path("/sys/class/infiniband")
MAX_METADATA_CHARS = 65_536
CHUNK_BYTES = 67_108_864  # of one read: what `timeout_s` is for
STAGING_LIMIT_S = 30.0  # longest wait for staging memory, some of which silent owners may keep
PROOF_HEAD_BYTES = GENERATIONS_OFFSET  # the header, as it lies in the arena
LEAST_SLAB_BYTES = 4096

Address = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
SlabNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class NixlParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The offer: which bytes of which arena, where they lie in the owner's memory, and how its agent is reached."""

    agent: Annotated[str, msgspec.Meta(pattern=r"^baton-[0-9a-f]{32}\Z")]
    metadata: Annotated[str, msgspec.Meta(max_length=MAX_METADATA_CHARS)]  # NIXL's, base64
    check: Annotated[
        str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")
    ]  # xxh3-128 of it: NIXL must not see what is not whole
    arena: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}\\Z")]
    base: Address  # of the arena's header
    data: Address  # of the run
    memory: Memory  # that the run lies in
    device: Annotated[int, msgspec.Meta(ge=0, lt=1024)]
    first: SlabNumber
    count: SlabNumber
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    is_filled: bool = True  # False: the bytes lie on the owner's GPU, which has to be asked for them


def create_way(
    settings: TransferSettings, store: BlockStore, copies: CopyThreads, ask_to_fill: AskToFill, *, exports: bool
) -> Way:
    """NIXL with the backend in `transfer.nixl`."""
    return NixlWay(settings, store, copies, ask_to_fill, exports=exports)


class NixlWay:
    """`workers.transfers.way.Way` over NIXL. An agent for what is read from here, another one for what is read by us."""

    def __init__(
        self,
        settings: TransferSettings,
        store: BlockStore,
        copies: CopyThreads,
        ask_to_fill: AskToFill,
        *,
        exports: bool,
    ) -> None:
        self._settings: NixlSettings = settings.nixl
        self._is_asked_for = settings.kind == "nixl"
        self._store = store
        self._copies = copies
        self._ask_to_fill = ask_to_fill
        self._is_exporting = exports
        self._staging = Staging(settings.nixl.staging_bytes, settings.slab_bytes)
        self._owner: Agent | None = None
        self._reader: Agent | None = None
        self._base = 0

    async def start(self, device: int | None) -> None:
        """Make the agents and register the memory. Unless it is the only way, it is in use on hosts with RDMA only. See `Way.start`."""
        if not self._is_asked_for and not has_rdma():
            raise Absent("this host has no RDMA device")
        try:
            await asyncio.to_thread(load_nixl)
        except Unusable as error:
            raise Absent(str(error)) from error
        if self._is_exporting:
            memory = self._store.memory()
            self._base = address_of(memory)
            self._owner = self._agent(lambda: self._store.num_exports > 0)
            await self._owner.start(self._base, len(memory))
        self._reader = self._agent(None)
        staging = self._staging.memory()
        await self._reader.start(address_of(staging), len(staging))
        self._peers = Peers(self._reader, self._settings.timeout_s)

    def offer(self, export: Export) -> dict[str, Any] | None:
        """Where the export lies, and the agent to read it through."""
        if (placed := export.host) is None:
            return None
        assert self._owner is not None
        _, offset = self._store.place(export)
        params = NixlParams(
            agent=self._owner.name,
            metadata=base64.b64encode(self._owner.metadata).decode(),
            check=xxhash.xxh3_128_hexdigest(self._owner.metadata),
            arena=placed.arena,
            base=self._base,
            data=self._base + offset,
            memory="DRAM",
            device=0,
            first=placed.run.first,
            count=placed.run.length,
            generation=placed.generation,
            is_filled=export.device is None,
        )
        return msgspec.structs.asdict(params)

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Read the bytes from their owner, which must live. See `Way.fetch`."""
        offer = read_params(handle, params, NixlParams)
        metadata = _decoded(handle, offer)
        proof_bytes = PROOF_HEAD_BYTES + 8 * offer.count
        if handle.nbytes + proof_bytes > self._staging.nbytes:
            raise Unusable(f"{handle.nbytes} bytes are more than transfer.nixl.staging_bytes = {self._staging.nbytes}")
        try:
            async with asyncio.timeout(STAGING_LIMIT_S):
                piece = await self._staging.take(handle.nbytes + proof_bytes)
        except TimeoutError:
            raise Unusable(f"no staging memory was free for {STAGING_LIMIT_S:g} s") from None
        readings: list[asyncio.Future[None]] = []  # into that memory
        try:
            peer = await self._peers.meet(offer.agent, metadata)
            if not offer.is_filled:
                await self._ask_to_fill(handle)
            proof, data = piece.data[:proof_bytes], piece.data[proof_bytes:]
            await self._read(peer, offer, data, proof, readings)
            _check(handle, offer, proof)
            await self._copies.copy(handle.nbytes, lambda: _scatter(data, handle, into), device=into.device)
        finally:
            self._give_back(piece, readings)

    async def close(self) -> None:
        """End both agents: nothing is read here or by us any more. May be called twice."""
        self._staging.close()
        for agent in (self._reader, self._owner):
            if agent is not None:
                await agent.close()

    def _agent(self, has_readers: Any) -> Agent:
        return Agent(f"baton-{secrets.token_hex(16)}", self._settings.backend, has_readers)

    async def _read(
        self, peer: Peer, offer: NixlParams, data: memoryview, proof: memoryview, readings: list[asyncio.Future[None]]
    ) -> None:
        """The bytes, in chunks, and then what proves them."""
        ours = address_of(data)
        for at in range(0, len(data), CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, len(data) - at)
            chunk = Piece(offer.data + at, ours + at, nbytes, offer.device)
            await self._peers.read(peer, offer.memory, [chunk], readings)
        ours, generations = address_of(proof), offer.base + GENERATIONS_OFFSET + 8 * offer.first
        head = Piece(offer.base, ours, PROOF_HEAD_BYTES)
        tail = Piece(generations, ours + PROOF_HEAD_BYTES, len(proof) - PROOF_HEAD_BYTES)
        await self._peers.read(peer, "DRAM", [head, tail], readings)

    def _give_back(self, piece: StagingPiece, readings: list[asyncio.Future[None]]) -> None:
        """Free staging memory once nothing is written into it any more: a read goes on although nobody waits for it."""
        if readings and not readings[-1].done():  # they were one after the other
            readings[-1].add_done_callback(lambda _: self._staging.give_back(piece))
        else:
            self._staging.give_back(piece)


def has_rdma() -> bool:
    """Whether this host has a device for RDMA."""
    try:
        return any(RDMA_DEVICES.iterdir())
    except OSError:
        return False


def address_of(memory: memoryview) -> int:
    """Where it begins in this process."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data) if len(memory) else 0


def _decoded(handle: KVHandle, offer: NixlParams) -> bytes:
    """NIXL's metadata. Raises `WireError` where the offer contradicts itself."""
    if not 1 <= offer.count <= handle.nbytes // LEAST_SLAB_BYTES + 1:
        raise WireError(f"handle {handle.id}: params: {offer.count} slabs for {handle.nbytes} bytes - at `$.count`")
    try:
        metadata = base64.b64decode(offer.metadata, validate=True)
    except binascii.Error as error:
        raise WireError(f"handle {handle.id}: params: {error} - at `$.metadata`") from error
    if xxhash.xxh3_128_hexdigest(metadata) != offer.check:
        raise WireError(f"handle {handle.id}: params: they are not whole - at `$.metadata`")
    return metadata


def _check(handle: KVHandle, offer: NixlParams, proof: memoryview) -> None:
    """Raise `KVLost` unless what was read is of that arena and all of its slabs were of that generation."""
    header = Header(*HEADER.unpack_from(proof))
    if header.slab_bytes < 1 or header != Header.of(offer.arena, header.slab_bytes, header.num_slabs):
        raise KVLost(f"handle {handle.id}: {offer.agent} has not the arena {offer.arena}", reason="gone")
    run = Run(offer.first, offer.count)
    if run.end > header.num_slabs or run.length != slabs_of(handle.nbytes, header.slab_bytes):
        raise KVLost(f"handle {handle.id} names slabs that {offer.arena} has not", reason="gone")
    if offer.memory == "DRAM" and offer.data != offer.base + header.offset(run):
        raise KVLost(f"handle {handle.id} names bytes that are not those of its slabs", reason="gone")
    generations = np.frombuffer(proof, dtype="<u8", count=offer.count, offset=PROOF_HEAD_BYTES)
    if not (generations == offer.generation).all():
        raise KVLost(
            f"handle {handle.id}: its slabs in {offer.arena} were freed or are used for others", reason="generation"
        )


def _scatter(data: memoryview, handle: KVHandle, into: BlockSink) -> None:
    if handle.digest is not None and digest_of(data) != handle.digest:
        raise KVLost(f"handle {handle.id}: the bytes that came are not those exported", reason="digest")
    into.scatter(data)
