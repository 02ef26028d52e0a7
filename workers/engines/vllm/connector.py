"""Baton's KV connector: vLLM asks it which tokens come from elsewhere, and leaves it the blocks of what has ended.

vLLM loads it by module path and makes two of it: one beside its scheduler, which decides, one beside its model, which knows the memory.
Both run in the engine's process and find the `Exchange` of their engine under its id, so nothing is serialized between them. What a
request fetches or publishes lies there under vLLM's id of the request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.v1.request import RequestStatus

from pipeline.errors import Unservable
from workers.engines.vllm.exchange import Exchange
from workers.engines.vllm.memory import PagedMemory

try:  # a label of vLLM's own statistics, which older versions have not
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HIT_SOURCE: Any = CacheHitSource.P2P
except ImportError:
    HIT_SOURCE = None

exchanges: dict[str, Any] = {}  # by engine id; the engine puts its own there before it makes its core


@dataclass(slots=True)
class Load:
    """Blocks to fetch for a request that waits for them."""

    key: str
    blocks: list[int]
    skip: int


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types here
    """What the scheduler's half tells the model's half with a step."""

    loads: list[Load] = field(default_factory=list)


class BatonConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module's docstring."""

    if HIT_SOURCE is not None:
        _cache_hit_source = HIT_SOURCE

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        engine_id = vllm_config.kv_transfer_config.engine_id
        if engine_id not in exchanges:
            raise Unservable(
                "vLLM put its model into another process than its scheduler: Baton serves engines of one process"
            )
        self._exchange: Exchange = exchanges[engine_id]
        self._block_size = vllm_config.cache_config.block_size
        self._loads: list[Load] = []

    # -- beside the scheduler ---------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens after those in the prefix cache come from the handle, and that they come while others go on."""
        fetch = self._exchange.pending_fetch(request.request_id)
        if fetch is None:
            return 0, False
        missing = fetch.num_tokens - num_computed_tokens
        only_tail = fetch.num_tokens % self._block_size
        if missing <= 0 or (fetch.leader is not None and (missing != only_tail or not fetch.leader.tail)):
            return 0, False  # a follower finds the rest in the prefix cache, or computes it: the handle may be gone
        return missing, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Its blocks are allocated. vLLM calls this once more, with 0, when they were received."""
        fetch = self._exchange.pending_fetch(request.request_id)
        if fetch is None:
            return
        self._exchange.begin_fetch(request.request_id, needs_blocks=num_external_tokens > 0)
        if num_external_tokens > 0:
            table = list(blocks.get_block_ids()[0][: -(-fetch.num_tokens // self._block_size)])
            skip = (fetch.num_tokens - num_external_tokens) // self._block_size
            self._loads.append(Load(request.request_id, table, skip))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the model's half has to begin in this step."""
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a prompt that has to be published until that is done."""
        if not self._exchange.has_export(request.request_id) or request.status == RequestStatus.FINISHED_ABORTED:
            return False, None
        self._exchange.export(request.request_id, list(block_ids[: -(-request.num_prompt_tokens // self._block_size)]))
        return True, None

    # -- beside the model -------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """vLLM has laid out its memory."""
        self._exchange.register(PagedMemory(kv_caches))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what the scheduler's half has asked for."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            self._exchange.fetch(load.key, load.blocks, load.skip)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled after all its layers are here."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are read when the prompt is computed."""

    def wait_for_save(self) -> None:
        """Nothing: see `save_kv_layer`."""
