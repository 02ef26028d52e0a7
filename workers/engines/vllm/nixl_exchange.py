"""Between vLLM's own NixlConnector and Baton's handles: vLLM's parameters travel in a handle, and Baton says when blocks are free.

By itself vLLM's owner frees blocks when the first reader says that it has them, or when a lease of 30 s ends. Baton's handle is valid until
Baton releases it: a request may wait longer than that, and one that a frozen worker has read may be read by another worker after it. So
here the lease does not end, what a reader says is kept, and the blocks go when the handle is released.

Nothing proves what was read: vLLM's blocks have no generation. A handle can be released while somebody reads, when its request is
cancelled. So blocks that no reader has reported stay for `LINGER_S` after the release, and a reader that is not through `FETCH_LIMIT_S`
after it was asked takes what it has read for lost, before vLLM knows these blocks by their hash.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

import msgspec

from pipeline.errors import EngineError, KVLost, Unservable, WireError
from pipeline.protocol import KVHandle
from workers.engines.vllm.exchange import Connector, Exchange, Export, Fetch, Moved
from workers.engines.vllm.futures import fail, give
from workers.transfer import Fetched, Transfer, TransferStats

TRANSFER = "vllm-nixl"  # in a handle
FOREVER_S = 10**9
FETCH_LIMIT_S = 20.0  # below the lease of a worker: who loses a request to another has not read it
LINGER_S = FETCH_LIMIT_S + 5.0
FETCHING_PAUSE_S, HOLDING_PAUSE_S, PAUSE_S = 0.001, 0.02, 0.002

BlockNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]  # what vLLM computes with it stays below 2**31


class NixlParams(msgspec.Struct, frozen=True):
    """What vLLM's connector cannot do without; the rest of what it says is carried unread."""

    remote_block_ids: Annotated[list[list[BlockNumber]], msgspec.Meta(min_length=1, max_length=1)]
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    tp_size: Annotated[int, msgspec.Meta(ge=1)]


class NixlExchange(Exchange):
    """A `HandOver`, see the module's docstring."""

    connector = Connector("workers.engines.vllm.nixl_connector", "BatonNixlConnector", {"kv_lease_duration": FOREVER_S})

    def __init__(
        self,
        transfer: Transfer,
        layout: Callable[[], str],
        on_moved: Callable[[Moved], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__(transfer, layout, on_moved, post)
        self._owner = transfer.owner
        self._held: dict[str, tuple[str, int]] = {}  # by handle: vLLM's id of the request, bytes
        self._exported_bytes = 0
        self._fetched = Fetched()
        self._asked: dict[str, float] = {}  # when a request with something to read was expected
        self._begun: dict[str, float] = {}  # fetches that run, and since when
        self.tables: dict[str, list[int]] = {}  # the connector's: blocks of fetches that run
        self.free: Callable[[str, float], None] = lambda key, linger_s: None  # of the connector beside the model
        self.new_leases: Callable[[], dict[str, float]] = dict  # of the one beside the scheduler

    # -- in the loop ----------------------------------------------------------------------------------------------------------

    async def start(self, device: int | None) -> None:
        """Baton's transfer is not used. Raises `Unservable` where vLLM would find no NIXL."""
        if find_spec("nixl") is None:
            raise Unservable(
                "engine.vllm.connector = nixl: NIXL is not installed here: pip install 'baton-serve[nixl]'"
            )

    def expect_fetch(self, key: str, fetch: Fetch) -> None:
        """See `HandOver.expect_fetch`."""
        check(fetch.handle)
        super().expect_fetch(key, fetch)
        if not fetch.is_follower:
            self._asked[key] = time.monotonic()
            late = KVLost(f"handle {fetch.handle.id}: not there after {FETCH_LIMIT_S:g} s", reason="gone")
            self._loop.call_later(FETCH_LIMIT_S, fail, fetch.done, late)

    def params(self, key: str) -> dict[str, Any] | None:
        """See `HandOver.params`."""
        if key in self._exports:
            return {"do_remote_decode": True, "do_remote_prefill": False}
        fetch = self._fetches.get(key)
        if fetch is None or fetch.is_follower:
            return None
        return fetch.handle.params | {"do_remote_prefill": True, "do_remote_decode": False}

    async def release(self, handle_id: str) -> None:
        """See `HandOver.release`."""
        key, _ = self._held.pop(handle_id, ("", 0))
        if key:
            self._post(lambda: self.free(key, LINGER_S))

    def stats(self) -> TransferStats:
        """Handles keep blocks of vLLM: that is the room they share."""
        held = sum(nbytes for _, nbytes in self._held.values())
        total = (self.memory.num_blocks - 1) * self.memory.block_nbytes if self._memory else 0
        return TransferStats(
            handles=len(self._held),
            bytes_used=held,
            bytes_free=max(0, total - held),
            exported_bytes_total=self._exported_bytes,
            fetched_bytes_total=self._fetched.nbytes,
            fetched={TRANSFER: self._fetched} if self._fetched.handles else {},
        )

    # -- on vLLM's thread -----------------------------------------------------------------------------------------------------

    def _forget(self, key: str) -> None:
        super()._forget(key)
        self._asked.pop(key, None)

    def pause_s(self) -> float:
        """See `HandOver.pause_s`: NIXL is looked at in steps only."""
        if self._begun:
            return FETCHING_PAUSE_S
        return HOLDING_PAUSE_S if self._held else PAUSE_S

    def fetch_of(self, key: str) -> Fetch | None:
        """What a request fetches, begun or not."""
        return self._fetches.get(key)

    def begin_fetch(self, key: str, *, needs_blocks: bool) -> None:
        """Its place is allocated; without need of blocks the prefix cache had all of them."""
        super().begin_fetch(key, needs_blocks=needs_blocks)
        if needs_blocks:
            self._begun[key] = time.monotonic()

    def is_late(self, key: str) -> bool:
        """Whether what a request has read may have been freed before it was."""
        asked_s = self._asked.get(key)
        return asked_s is not None and time.monotonic() - asked_s > FETCH_LIMIT_S

    def end_fetch(self, key: str, *, is_lost: bool) -> None:
        """The blocks of this request are there, or cannot be had."""
        since_s, fetch = self._begun.pop(key, None), self._fetches.get(key)
        if since_s is None or fetch is None:
            return
        seconds = time.monotonic() - since_s
        self._loop.call_soon_threadsafe(self._end_fetch, fetch, is_lost, seconds)

    def publish(self, key: str, params: dict[str, Any] | None) -> None:
        """vLLM keeps the blocks of this request for readers, or it does not."""
        self._loop.call_soon_threadsafe(self._publish, key, self._exports.get(key), params)

    # -- in the loop ----------------------------------------------------------------------------------------------------------

    def _end_fetch(self, fetch: Fetch, is_lost: bool, seconds: float) -> None:
        if is_lost:
            fail(fetch.done, KVLost(f"handle {fetch.handle.id}: NIXL could not read it", reason="gone"))
            return
        so_far = self._fetched
        if give(fetch.done, None) and not fetch.is_follower:
            self._fetched = Fetched(
                handles=so_far.handles + 1, nbytes=so_far.nbytes + fetch.handle.nbytes, seconds=so_far.seconds + seconds
            )

    def _publish(self, key: str, export: Export | None, params: dict[str, Any] | None) -> None:
        if params is None:
            if export is not None:
                fail(export.handle, EngineError(f"request {export.request_id}: vLLM keeps no blocks of it"))
            return
        if export is None or export.handle.done():  # nobody waits for it any more, and nobody has heard of it
            self._post(lambda: self.free(key, 0.0))
            return
        params = msgspec.to_builtins(params)
        num_blocks = len(params["remote_block_ids"][0])
        handle = KVHandle(
            id=uuid.uuid4().hex, request_id=export.request_id, owner=self._owner, transfer=TRANSFER,
            layout=export.layout or self._layout(),
            num_tokens=export.num_tokens, num_blocks=num_blocks, nbytes=num_blocks * self.memory.block_nbytes,
            cached_tokens=export.cached_tokens, params=params,
        )  # fmt: skip
        self._held[handle.id] = key, handle.nbytes
        self._exported_bytes += handle.nbytes
        give(export.handle, handle)


def check(handle: KVHandle) -> None:
    """Raise `WireError` for a handle that vLLM's connector cannot have made."""
    if handle.transfer != TRANSFER:
        raise WireError(f"handle {handle.id} is for transfer {handle.transfer!r}, this engine takes {TRANSFER!r}")
    try:
        params = msgspec.convert(handle.params, NixlParams)
    except msgspec.ValidationError as error:
        raise WireError(f"handle {handle.id}: params: {error}") from error
    if len(params.remote_block_ids[0]) != handle.num_blocks:
        raise WireError(f"handle {handle.id}: params: not {handle.num_blocks} blocks - at `$.remote_block_ids`")
