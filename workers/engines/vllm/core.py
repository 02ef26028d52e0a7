"""vLLM's engine core in this process, stepped by one thread.

vLLM is made, called and closed on that thread alone. Orders reach it through `post`, outputs leave through `on_outputs` in the event loop,
as one list a step. Between vLLM's scheduler and Baton there is neither a socket nor a serialization.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.kv_events import KVEvent
from workers.engines.vllm.exchange import Moved
from workers.engines.vllm.futures import fail, give
from workers.engines.vllm.kv_events import Publisher

T = TypeVar("T")
MAX_UNREAD_STEPS = 256  # the engine pauses while its reader is this far behind


@dataclass(frozen=True, slots=True)
class Load:
    """What vLLM holds now: requests that run and that wait, blocks that are used and that are free (or would be, by eviction)."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_free: int = 0


class Core:
    """Runs `make` on its thread and steps what it gives until `close`. In the loop `on_outputs` is called with what a step gave and the
    seconds that vLLM took for it, `on_death` with what a step raised, and `on_refusal` with vLLM's id of a request that it does not take,
    and why. `unread` tells how many steps' outputs wait to be read, `pause_s` how long to rest while all requests wait."""

    def __init__(
        self, on_outputs: Callable[[Any, float], None], on_death: Callable[[BaseException], None],
        on_refusal: Callable[[str, Exception], None], unread: Callable[[], int], pause_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._on_outputs = on_outputs
        self._on_death = on_death
        self._on_refusal = on_refusal
        self._unread = unread
        self._pause_s = pause_s
        self._orders: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._took_s = 0.0  # by vLLM, since it gave outputs last
        self._engine: Any = None
        self._thread: threading.Thread | None = None

    async def start(self, make: Callable[[], Any]) -> Any:
        """Make vLLM's `LLMEngine` and begin to step it. Raises what `make` raises."""
        started: asyncio.Future[Any] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(make, started), name="vllm", daemon=True)
        self._thread.start()
        return await started

    async def call(self, what: Callable[[], T]) -> T:
        """Run something between two steps and wait for what it gives."""
        answer: asyncio.Future[T] = self._loop.create_future()

        def order() -> None:
            try:
                self._say(give, answer, what())
            except Exception as error:  # noqa: BLE001  # it belongs to whoever asked
                self._say(fail, answer, error)

        self.post(order)
        return await answer

    def post(self, order: Callable[[], None]) -> None:
        """Run something between two steps."""
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    async def tell_events(self, tell: Callable[[list[KVEvent]], None]) -> None:
        """`tell` hears in the loop what happens to the prefix cache from now on."""
        publisher = Publisher(lambda events: self._say(tell, events))
        await self.call(lambda: setattr(self._scheduler, "kv_event_publisher", publisher))

    def add(self, request: Any, prepare: Callable[[Any], None]) -> None:
        """Queue a request (vLLM's `EngineCoreRequest`). `prepare` gets it as the scheduler will, before the scheduler does."""
        self.post(lambda: self._add(request, prepare))

    def abort(self, keys: list[str]) -> None:
        """Stop requests; those that are unknown or have ended are ignored."""
        self.post(lambda: self._client.abort_requests(keys))

    def tell(self, moved: Moved) -> None:
        """Blocks were sent or received. A request whose blocks were lost must not run on them: it is stopped first."""
        self.post(lambda: self._tell(moved))

    def load(self) -> Load:
        """Asked from any thread: it reads four numbers that vLLM keeps, and vLLM tells them with a step only."""
        if self._engine is None:
            return Load()
        running, waiting = self._scheduler.get_request_counts()
        pool = self._scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        return Load(running, waiting, pool.num_gpu_blocks - 1 - free, free)

    def read(self) -> None:
        """Outputs were read: a core that waits for that goes on."""
        with self._changed:
            self._changed.notify()

    async def close(self) -> None:
        """Stop stepping and give back vLLM's memory. May be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # -- on the thread ----------------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        return self._engine.engine_core

    @property
    def _scheduler(self) -> Any:
        return self._client.engine_core.scheduler

    def _run(self, make: Callable[[], Any], started: asyncio.Future[Any]) -> None:
        try:
            self._engine = make()
        except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits for the start
            self._say(fail, started, error)
            return
        self._say(give, started, self._engine)
        try:
            while self._take_orders():
                self._step()
        except BaseException as error:  # noqa: BLE001  # whatever it was, the engine is dead and every waiter is told
            self._say(self._on_death, error)
        finally:
            self._client.shutdown()

    def _take_orders(self) -> bool:
        """Run what was posted; returns when there is something to step, False when all is over."""
        while True:
            with self._changed:
                self._changed.wait_for(self._has_something_to_do)
                if self._is_closing:
                    return False
                orders, self._orders = self._orders, deque()
            for order in orders:
                order()
            if self._has_work():
                return True

    def _has_something_to_do(self) -> bool:
        return self._is_closing or bool(self._orders) or (self._has_work() and self._unread() < MAX_UNREAD_STEPS)

    def _has_work(self) -> bool:
        return bool(self._scheduler.has_requests() or self._client.engine_core.batch_queue)

    def _step(self) -> None:
        began_s = time.perf_counter()
        outputs = self._client.get_output()
        self._took_s += time.perf_counter() - began_s
        if outputs.outputs or outputs.scheduler_stats:
            self._say(self._on_outputs, outputs, self._took_s)
            self._took_s = 0.0
        if not outputs.outputs and not self._scheduler.running:  # all wait: for blocks, whose arrival is told, or else
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._orders, self._pause_s())

    def _add(self, request: Any, prepare: Callable[[Any], None]) -> None:
        core = self._client.engine_core
        try:
            made, wave = core.preprocess_add_request(request)
            prepare(made)
            core.add_request(made, wave)
        except Exception as error:  # noqa: BLE001  # it is this request's alone: what vLLM holds of it is taken back
            self._client.abort_requests([request.request_id])
            self._say(self._on_refusal, request.request_id, error)

    def _tell(self, moved: Moved) -> None:
        from vllm.v1.outputs import KVConnectorOutput

        self._client.abort_requests(list(moved.lost))
        known = self._scheduler.requests
        output = KVConnectorOutput(
            finished_sending={key for key in moved.sent if key in known},
            finished_recving={key for key in moved.received | moved.lost if key in known},
        )
        self._scheduler._update_from_kv_xfer_finished(output)  # between steps, so that nothing waits for the next one

    def _say(self, what: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon_threadsafe(what, *args)
