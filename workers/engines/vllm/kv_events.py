"""vLLM's KV cache events without its socket: its scheduler hands them to a publisher, which here is a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from pipeline.protocol import pack_tokens


class Publisher:
    """Stands where vLLM has its ZMQ publisher; called on the thread that steps it."""

    def __init__(self, tell: Callable[[list[KVEvent]], None]) -> None:
        self._tell = tell

    def publish(self, batch: Any) -> None:
        """The events of a step (vLLM's `KVEventBatch`)."""
        if events := converted(batch.events):
            self._tell(events)

    def shutdown(self) -> None:
        """Nothing is open."""

    def get_publisher_config(self) -> None:
        """Nobody may connect to it."""


def converted(events: Sequence[Any]) -> list[KVEvent]:
    """vLLM's events as Baton's. Where some layers have blocks of their own (a group each), those of the first group stand for all."""
    found: list[KVEvent] = []
    for event in events:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            found.append(BlocksCleared())
        elif event.group_idx:
            continue
        elif kind == "BlockRemoved":
            found.append(BlocksRemoved(list(event.block_hashes)))
        elif kind == "BlockStored":
            found.append(_stored(event))
    return found


def _stored(event: Any) -> BlocksStored:
    lora_name = event.lora_name or ""
    first = (event.extra_keys or [None])[0] or ()
    salts = [key for key in first if isinstance(key, str) and key != lora_name]
    return BlocksStored(
        list(event.block_hashes),
        event.parent_block_hash,
        pack_tokens(event.token_ids),
        event.block_size,
        lora_name,
        salts[0] if salts else "",
    )
