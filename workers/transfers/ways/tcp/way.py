"""The way `tcp`: the reader asks the owner's server for the bytes. Between hosts, and where two processes share no memory.

Life of a fetch:
1. wait in turn for staging memory, since the sink wants all bytes in one view;
2. ask over one connection, or over several for their parts of a large handle; each answers with its bytes and their digest;
3. compare the digests: what was freed or used again while it was on its way shows here, if nowhere else;
4. scatter.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Iterable
from typing import Annotated, Any

import msgspec

from pipeline.config import TcpSettings, TransferSettings
from pipeline.errors import KVLost, WireError
from pipeline.protocol import KVHandle
from workers.transfer import BlockSink
from workers.transfers.copies import CopyThreads
from workers.transfers.store import BlockStore, Export, digest_of
from workers.transfers.way import AskToFill, Unusable, Way, read_params
from workers.transfers.ways.staging import Staging
from workers.transfers.ways.tcp.frames import HANDLE_ID, TAIL_BYTES, Request, Status, read_tail
from workers.transfers.ways.tcp.handshake import KEY_BYTES, Stranger
from workers.transfers.ways.tcp.owners import Owner, Owners
from workers.transfers.ways.tcp.server import BlockServer

MIN_PART_BYTES = 4_194_304  # a part of a handle that is worth a connection of its own


class TcpParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The offer: where the owner's server is, and what proves that it is the owner's."""

    host: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:%-]{1,255}\Z")]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    key: Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{2 * KEY_BYTES}}}\\Z")]
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


def create_way(
    settings: TransferSettings, store: BlockStore, copies: CopyThreads, ask_to_fill: AskToFill, *, exports: bool
) -> Way:
    """Over the addresses in `transfer.tcp`."""
    return TcpWay(settings, store, copies, exports=exports)


class TcpWay:
    """`workers.transfers.way.Way` over TCP."""

    def __init__(self, settings: TransferSettings, store: BlockStore, copies: CopyThreads, *, exports: bool) -> None:
        self._settings: TcpSettings = settings.tcp
        self._copies = copies
        self._key = secrets.token_bytes(KEY_BYTES)
        self._server = BlockServer(settings.tcp, store, self._key) if exports else None
        self._owners = Owners(settings.tcp.timeout_s)
        self._staging = Staging(settings.tcp.staging_bytes, settings.slab_bytes)

    async def start(self, device: int | None) -> None:
        """Listen, where this process exports. See `Way.start`."""
        if self._server is not None:
            await self._server.start()

    def offer(self, export: Export) -> dict[str, Any] | None:
        """Where to ask for the export."""
        if export.host is None:
            return None
        assert self._server is not None
        params = TcpParams(
            host=self._settings.advertise or self._server.host,
            port=self._server.port,
            key=self._key.hex(),
            generation=export.host.generation,
        )
        return msgspec.structs.asdict(params)

    async def fetch(self, handle: KVHandle, params: dict[str, Any], into: BlockSink) -> None:
        """Ask the owner, which must live. See `Way.fetch`."""
        offer, owner = self._read(handle, params)
        if handle.nbytes > self._staging.nbytes:
            raise Unusable(f"{handle.nbytes} bytes are more than transfer.tcp.staging_bytes = {self._staging.nbytes}")
        async with self._staging.hold(handle.nbytes) as data:
            parts = self._parts(handle, offer.generation)
            await _all(
                self._receive(owner, part, data[part.offset : part.offset + part.nbytes], handle) for part in parts
            )
            await self._copies.copy(handle.nbytes, lambda: _scatter(data, handle, into), device=into.device)

    async def ask_to_fill(self, handle: KVHandle, params: dict[str, Any]) -> None:
        """See `workers.transfers.way.AskToFill`: a request for no bytes does it."""
        offer, owner = self._read(handle, params)
        await self._receive(owner, Request(handle.id, offer.generation, 0, 0), memoryview(b""), handle)

    async def close(self) -> None:
        """Hang up on owners and readers. May be called twice."""
        self._staging.close()
        await self._owners.close()
        if self._server is not None:
            await self._server.close()

    def _read(self, handle: KVHandle, params: dict[str, Any]) -> tuple[TcpParams, Owner]:
        offer = read_params(handle, params, TcpParams)
        if not HANDLE_ID.fullmatch(handle.id):
            raise WireError(f"handle {handle.id!r}: its id is none that a tcp owner gives")
        return offer, Owner(offer.host, offer.port, bytes.fromhex(offer.key))

    def _parts(self, handle: KVHandle, generation: int) -> list[Request]:
        """The handle in pieces of almost the same size, as many as `streams` and the size allow."""
        count = max(1, min(self._settings.streams, handle.nbytes // MIN_PART_BYTES))
        ends = [handle.nbytes * number // count for number in range(count + 1)]
        return [Request(handle.id, generation, start, end - start) for start, end in itertools.pairwise(ends)]

    async def _receive(self, owner: Owner, part: Request, into: memoryview, handle: KVHandle) -> None:
        """One part, proved. Raises `Unusable` where the owner cannot be asked, else `KVLost`."""
        where = f"{owner.host}:{owner.port}"
        try:
            status, expected, found = await self._ask(owner, part, into)
            if status is Status.SENT and expected != found:  # were they freed while they were on their way?
                status, _, _ = await self._ask(owner, part._replace(nbytes=0), into[:0])
        except (OSError, Stranger) as error:
            raise Unusable(f"{where}: {error}") from error
        except ValueError as error:
            raise WireError(f"handle {handle.id}: {where}: {error}") from error
        match status:
            case Status.GENERATION:
                raise KVLost(f"handle {handle.id}: its bytes at {where} were freed", reason="generation")
            case Status.OUTSIDE:
                raise KVLost(f"handle {handle.id} names bytes that {where} has not", reason="gone")
        if expected != found:
            raise KVLost(f"handle {handle.id}: the bytes that came are not those of {where}", reason="digest")

    async def _ask(self, owner: Owner, part: Request, into: memoryview) -> tuple[Status, bytes, bytes]:
        """How it ended, the digest that the owner tells, and that of what came."""
        async with self._owners.ask(owner, part) as (flow, status):
            if status is not Status.SENT:
                return status, b"", b""
            found = await flow.receive(into)
            status, expected = read_tail(await flow.read(TAIL_BYTES))
            return status, expected, found


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of it at once. Where one fails the others end before its error is raised: none of them writes any more."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _scatter(data: memoryview, handle: KVHandle, into: BlockSink) -> None:
    if handle.digest is not None and digest_of(data) != handle.digest:
        raise KVLost(f"handle {handle.id}: the bytes that came are not those exported", reason="digest")
    into.scatter(data)
