"""The contract of a hand-over: how blocks leave one vLLM and get into another one, and how Baton's handles come from it.

The engine tells it what a request of vLLM will publish or fetch, under vLLM's id of the request; the rest happens between it and a KV
connector of vLLM, which runs on vLLM's thread and finds it in `connector.exchanges`. Two implementations:
- `exchange.Exchange`: Baton's connector and Baton's transfers. The bytes are copied out, so vLLM frees its blocks at once;
- `nixl_exchange.NixlExchange`: vLLM's own NixlConnector. The blocks stay vLLM's until the handle is released.
Engines with a hand-over of their own (SGLang, TensorRT-LLM) fit the same way: their parameters are a handle's `params`, carried unread.
"""

from __future__ import annotations

from typing import Any, Protocol

from workers.engines.vllm.exchange import Connector, Export, Fetch
from workers.engines.vllm.memory import PagedMemory
from workers.transfer import TransferStats


class HandOver(Protocol):
    """See the module's docstring. Used from the engine's event loop, but for what a connector of its own asks of it."""

    connector: Connector

    async def start(self, device: int | None) -> None:
        """Take what is needed, before vLLM is made; `device`: the GPU that it will compute on. Raises `TransferError`."""
        ...

    @property
    def memory(self) -> PagedMemory:
        """Known once vLLM has started."""
        ...

    def expect_export(self, key: str, export: Export) -> None:
        """This request will end with blocks to publish: `export.handle` gets the handle."""
        ...

    def expect_fetch(self, key: str, fetch: Fetch) -> None:
        """This request begins with blocks to fetch: `fetch.done` ends when they are there, or with `KVLost`.

        Raises `WireError` for a handle of another hand-over.
        """
        ...

    def params(self, key: str) -> dict[str, Any] | None:
        """What vLLM is told of this request for its connector (`kv_transfer_params`)."""
        ...

    def forget(self, key: str) -> None:
        """This request has left. What is published stays until it is released."""
        ...

    async def release(self, handle_id: str) -> None:
        """Free what was published under this id: nobody will fetch it any more. Unknown ids are ignored."""
        ...

    def pause_s(self) -> float:
        """How long a vLLM whose requests all wait may rest between two steps. Called on vLLM's thread."""
        ...

    def stats(self) -> TransferStats:
        """Figures now."""
        ...

    async def close(self) -> None:
        """Let what runs end, and give everything back; vLLM has ended."""
        ...
