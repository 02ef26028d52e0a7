"""vLLM's own NixlConnector, with Baton deciding what is fetched and when blocks are free (`nixl_exchange.py` says why).

vLLM makes two of it, one beside its scheduler and one beside its model, both on the engine's thread. NIXL is looked at once a step: `Core`
steps while anything is held or fetched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector
from vllm.platforms import current_platform

from workers.engines.vllm.connector import exchanges
from workers.engines.vllm.memory import PagedMemory
from workers.engines.vllm.nixl_exchange import NixlExchange

PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"  # where vLLM tells readers how to reach its agent; each engine needs its own
WORKER_MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker"


class BatonNixlConnector(NixlConnector):  # type: ignore[misc]  # vLLM has no types here
    """See the module's docstring."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._exchange: NixlExchange = exchanges[vllm_config.kv_transfer_config.engine_id]
        self._block_size = vllm_config.cache_config.block_size
        os.environ.setdefault(PORT, str(free_port()))
        with its_cores(), quiet_agent():
            super().__init__(vllm_config, role, kv_cache_config)
        self._memory: PagedMemory | None = None
        self._received: set[str] = set()  # in this step
        self._read: set[str] = set()  # a reader said so
        self._released: set[str] = set()  # Baton said so
        if role == KVConnectorRole.WORKER:
            self._exchange.free = self._free
        else:
            self._exchange.new_leases = lambda: self.connector_scheduler._reqs_need_send

    # -- beside the scheduler ---------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens after those in the prefix cache come from the handle, which has none of the log."""
        fetch = self._exchange.pending_fetch(request.request_id)
        if fetch is None:
            return 0, False
        missing = fetch.num_tokens - num_computed_tokens
        only_tail = fetch.num_tokens % self._block_size
        if missing <= 0 or (fetch.leader is not None and (missing != only_tail or not fetch.leader.tail)):
            return 0, False
        return missing, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Its blocks are allocated. vLLM calls this once more when they were received."""
        key = request.request_id
        fetch = self._exchange.pending_fetch(key)
        if fetch is None:
            if self._exchange.has_export(key):
                super().update_state_after_alloc(request, blocks, num_external_tokens)
            return
        self._exchange.begin_fetch(key, needs_blocks=num_external_tokens > 0)
        if num_external_tokens > 0:
            self._exchange.tables[key] = list(blocks.get_block_ids()[0][: -(-fetch.num_tokens // self._block_size)])
        if not fetch.is_follower:  # where nothing has to be read the owner is told so
            super().update_state_after_alloc(request, blocks, num_external_tokens)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a prompt that has to be published until its handle is released."""
        self._keep_quiet(request)
        keeps, params = super().request_finished_all_groups(request, block_ids)
        if keeps or self._exchange.has_export(request.request_id):
            self._exchange.publish(request.request_id, params if keeps else None)
        return keeps, params

    def _keep_quiet(self, request: Any) -> None:
        """vLLM would tell the owner to free what was not read. It may be read by another worker: Baton tells."""
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_prefill"):
            request.kv_transfer_params["do_remote_prefill"] = False

    # -- beside the model -------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """vLLM has laid out its memory."""
        super().register_kv_caches(kv_caches)
        self._memory = PagedMemory(kv_caches)
        self._exchange.register(self._memory)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """As `get_transfer_results`, for vLLM before 0.32."""
        sent, received = super().get_finished(finished_req_ids)
        return self._freed(sent), self._arrived(received)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """What was read by others and released, and what has arrived here."""
        results = super().get_transfer_results(finished_req_ids)
        results.finished_sending = self._freed(results.finished_sending)
        results.finished_recving = self._arrived(results.finished_recving)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be read. Called after what has arrived is known."""
        bad: set[int] = set(super().get_block_ids_with_load_errors())
        for key in self._received:
            table = self._exchange.tables.pop(key, [])
            if self._exchange.is_late(key):
                bad.update(table)
            self._exchange.end_fetch(key, is_lost=not bad.isdisjoint(table))
        self._received = set()
        return bad

    def _freed(self, sent: set[str]) -> set[str]:
        """Of the requests whose blocks were read, or need not be, those that Baton has released."""
        self._read |= sent
        free = self._read & self._released
        self._read -= free
        self._released -= free
        return free

    def _free(self, key: str, linger_s: float) -> None:
        """Baton has released the blocks of this request. Where no reader has said that it has them, they stay for a while."""
        self._released.add(key)
        for leases in (self.connector_worker._reqs_to_send, self._exchange.new_leases()):
            if key in leases:
                leases[key] = time.perf_counter() + linger_s

    def _arrived(self, received: set[str]) -> set[str]:
        """Those that NIXL has read, and followers whose last block is copied now from what their leader has kept."""
        assert self._memory is not None
        for key in received:
            fetch, table = self._exchange.fetch_of(key), self._exchange.tables.get(key)
            if fetch is not None and table and fetch.keeps_tail:
                tail = bytearray(self._memory.block_nbytes)
                self._memory.gather(table[-1:], memoryview(tail))
                fetch.tail = bytes(tail)
        copied = set()
        for key, table in self._exchange.tables.items():
            fetch = self._exchange.fetch_of(key)
            if key not in received and fetch is not None and fetch.leader is not None:
                self._memory.scatter(memoryview(fetch.leader.tail), table[-1:], 0, self._memory.now())
                copied.add(key)
        self._received = received | copied
        return self._received


@contextlib.contextmanager
def its_cores() -> Iterator[None]:
    """vLLM binds the thread that makes its NIXL to the last core, on CPUs. All that it starts later would stay there."""
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def quiet_agent() -> Iterator[None]:
    """NIXL's progress thread takes a whole core. On CPUs, where the model needs them, steps progress it."""
    module: Any = importlib.import_module(WORKER_MODULE)
    make = module.nixl_agent_config
    if current_platform.device_type == "cpu" and make is not None:
        module.nixl_agent_config = functools.partial(make, enable_prog_thread=False)
    try:
        yield
    finally:
        module.nixl_agent_config = make


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])
