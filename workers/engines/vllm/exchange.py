"""Between vLLM's scheduler and Baton's transfer: which blocks of which request go out or come in.

vLLM calls its connector from the thread that steps it; the transfer lives in the event loop. What has to cross goes through here, each
way without waiting. While blocks are read or written vLLM keeps them: `Moved` says when they are free to go. All is kept under vLLM's id
of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import BatonError, EngineError
from pipeline.protocol import KVHandle
from workers.engines.paged.exchange import ExportedBlocks
from workers.engines.vllm.futures import fail, give
from workers.engines.vllm.memory import PagedMemory
from workers.transfer import Memory, Transfer, TransferStats

POLL_S = 0.002  # while all requests wait for something that nobody tells us of, such as a grammar being compiled


@dataclass(frozen=True, slots=True)
class Connector:
    """The KV connector that vLLM loads for a hand-over."""

    module: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)  # `kv_connector_extra_config`


@dataclass(slots=True, eq=False)
class Export:
    """The blocks of a prompt, on their way out."""

    request_id: str
    num_tokens: int
    handle: asyncio.Future[KVHandle]
    cached_tokens: int = 0
    layout: str = ""  # where it is not the engine's: the blocks were computed under an adapter

    @property
    def published(self) -> KVHandle | None:
        """The handle, once the blocks are published."""
        is_there = self.handle.done() and not self.handle.cancelled() and self.handle.exception() is None
        return self.handle.result() if is_there else None


@dataclass(slots=True, eq=False)
class Fetch:
    """Blocks on their way in. The first choice of a request takes them through the transfer; the others find the full ones in the prefix
    cache and copy the last, partly filled one, which the first has left in `tail`."""

    handle: KVHandle
    done: asyncio.Future[None]
    leader: Fetch | None = None
    keeps_tail: bool = False
    layout: str = ""  # as of an export
    tail: bytes = b""
    has_begun: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values the blocks hold."""
        return self.handle.num_tokens

    @property
    def is_follower(self) -> bool:
        """Whether another choice has fetched the handle."""
        return self.leader is not None


@dataclass(slots=True)
class Moved:
    """What vLLM has to be told: requests whose blocks were sent, received, or could not be received."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)


class Exchange:
    """A `HandOver`, see the module's docstring. `layout` is asked once vLLM has started; `on_moved` is called in the loop, and `post` to
    run something on vLLM's thread between two steps."""

    connector = Connector("workers.engines.vllm.connector", "BatonConnector")

    def __init__(
        self,
        transfer: Transfer,
        layout: Callable[[], str],
        on_moved: Callable[[Moved], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._transfer = transfer
        self._layout = layout
        self._on_moved = on_moved
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._memory: PagedMemory | None = None
        self._exports: dict[str, Export] = {}
        self._fetches: dict[str, Fetch] = {}
        self._copies: set[asyncio.Task[None]] = set()

    # -- in the loop ----------------------------------------------------------------------------------------------------------

    def expect_export(self, key: str, export: Export) -> None:
        """This request will end with blocks to publish."""
        self._exports[key] = export

    def expect_fetch(self, key: str, fetch: Fetch) -> None:
        """This request begins with blocks to fetch."""
        self._fetches[key] = fetch

    async def start(self, device: int | None) -> None:
        """See `HandOver.start`."""
        await self._transfer.start(device)

    def params(self, key: str) -> dict[str, Any] | None:
        """Nothing: the connector finds it here."""
        return None

    async def release(self, handle_id: str) -> None:
        """See `HandOver.release`."""
        await self._transfer.release(handle_id)

    def stats(self) -> TransferStats:
        """See `HandOver.stats`."""
        return self._transfer.stats()

    def pause_s(self) -> float:
        """See `HandOver.pause_s`: what is copied says so itself."""
        return POLL_S

    def forget(self, key: str) -> None:
        """This request has left. Copies that run go on to their end.

        It is so between two steps: vLLM asks several times in one what a request fetches, and would wait for ever for blocks that
        were promised by the first answer and not fetched after the second.
        """
        self._post(lambda: self._forget(key))

    async def close(self) -> None:
        """Let copies that run end."""
        for copy in self._copies:
            copy.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)

    # -- on vLLM's thread -----------------------------------------------------------------------------------------------------

    def _forget(self, key: str) -> None:
        self._exports.pop(key, None)
        self._fetches.pop(key, None)

    @property
    def memory(self) -> PagedMemory:
        """Known once vLLM has laid out its caches."""
        assert self._memory is not None
        return self._memory

    def register(self, memory: PagedMemory) -> None:
        """vLLM has laid out its caches."""
        self._memory = memory

    def pending_fetch(self, key: str) -> Fetch | None:
        """What this request has to fetch and has not begun to. A preempted one that begins anew computes."""
        fetch = self._fetches.get(key)
        return None if fetch is None or fetch.has_begun else fetch

    def begin_fetch(self, key: str, *, needs_blocks: bool) -> None:
        """Its place is allocated; without need of blocks the prefix cache had all of them."""
        fetch = self._fetches[key]
        fetch.has_begun = True
        if not needs_blocks:
            self._loop.call_soon_threadsafe(give, fetch.done, None)

    def fetch(self, key: str, blocks: list[int], skip: int) -> None:
        """Fill these blocks but for the first `skip`: the request waits until it is told."""
        self._start(self._fetch(key, self._fetches.get(key), Place(self.memory, blocks, skip, self.memory.now())))

    def has_export(self, key: str) -> bool:
        """Whether the blocks of this request are to be published."""
        return key in self._exports

    def export(self, key: str, blocks: list[int]) -> None:
        """Publish these blocks: vLLM keeps them until it is told."""
        self._start(self._export(key, self._exports.get(key), blocks))

    # -- copies ---------------------------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[None, None, None]) -> None:
        def start() -> None:
            copy = self._loop.create_task(work)
            self._copies.add(copy)
            copy.add_done_callback(self._copies.discard)

        self._loop.call_soon_threadsafe(start)

    async def _export(self, key: str, export: Export | None, blocks: list[int]) -> None:
        try:
            if export is None or export.handle.done():  # nobody waits for it any more
                return
            source = ExportedBlocks(
                self.memory, request_id=export.request_id, layout=export.layout or self._layout(), blocks=blocks,
                block_nbytes=self.memory.block_nbytes, num_tokens=export.num_tokens, cached_tokens=export.cached_tokens,
            )  # fmt: skip
            publishing = asyncio.ensure_future(self._transfer.export(source))
            export.handle.add_done_callback(lambda _: publishing.cancel())  # it may be waiting for room
            handle = await publishing
            if not give(export.handle, handle):
                await self._transfer.release(handle.id)
        except asyncio.CancelledError:
            if export is not None:
                export.handle.cancel()
        except BatonError as error:
            assert export is not None
            fail(export.handle, error)
        except Exception as error:  # noqa: BLE001  # whatever it is, its request waits for it
            assert export is not None
            fail(export.handle, EngineError(f"request {export.request_id}: its blocks cannot be exported: {error!r}"))
        finally:
            self._on_moved(Moved(sent={key}))

    async def _fetch(self, key: str, fetch: Fetch | None, place: Place) -> None:
        moved = Moved(lost={key})
        try:
            if fetch is None:
                return
            if fetch.leader is not None:
                await asyncio.shield(asyncio.to_thread(place.fill_last, fetch.leader.tail))
            else:
                await self._transfer.fetch(fetch.handle, Sink(place, fetch, fetch.layout or self._layout()))
            moved = Moved(received={key})
        except asyncio.CancelledError:
            if fetch is not None:
                fetch.done.cancel()
        except BatonError as error:
            assert fetch is not None
            fail(fetch.done, error)
        except Exception as error:  # noqa: BLE001  # whatever it is, its request waits for it
            assert fetch is not None
            fail(fetch.done, EngineError(f"handle {fetch.handle.id}: {error!r}"))
        else:
            give(fetch.done, None)
        finally:
            self._on_moved(moved)


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks of vLLM to fill, of which the first `skip` are filled already, and the moment at which they were given."""

    memory: PagedMemory
    blocks: list[int]
    skip: int
    given: Any

    def fill(self, data: Memory) -> None:
        """Fill them from a run of all of them."""
        self.memory.scatter(data, self.blocks, self.skip, self.given)

    def fill_last(self, data: bytes) -> None:
        """Fill the last of them."""
        self.memory.scatter(memoryview(data), self.blocks[-1:], 0, self.given)

    def last(self) -> bytes:
        """A copy of the last of them."""
        copy = bytearray(self.memory.block_nbytes)
        self.memory.gather(self.blocks[-1:], memoryview(copy))
        return bytes(copy)


class Sink:
    """A `BlockSink` over a place in vLLM's memory."""

    def __init__(self, place: Place, fetch: Fetch, layout: str) -> None:
        self._place = place
        self._fetch = fetch
        self.device = place.memory.device
        self.layout = layout
        self.nbytes = len(place.blocks) * place.memory.block_nbytes

    def scatter(self, data: Memory) -> None:
        """See `BlockSink.scatter`."""
        self._place.fill(data)
        if self._fetch.keeps_tail:
            self._fetch.tail = self._place.last()
