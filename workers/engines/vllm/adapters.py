"""LoRA adapters in vLLM: loaded when the engine starts, found by name, and told apart by what is in their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from pipeline.errors import Unservable
from pipeline.protocol import BackendInput

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM can make room
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Adapter(NamedTuple):
    """One adapter. `digest`: of its files, for blocks that were computed under other weights are none of it."""

    name: str
    number: int  # vLLM's
    folder: str
    rank: int
    digest: str


def read_adapters(loras: Mapping[str, str]) -> dict[str, Adapter]:
    """The adapters of these folders, not loaded yet. Raises `Unservable` naming the folder that holds none."""
    return {name: _read(name, number, Path(folder)) for number, (name, folder) in enumerate(loras.items(), start=1)}


def arguments_for(adapters: Mapping[str, Adapter], *, on_cpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments that make room for all of them at once.

    On a CPU for one more, which stays empty: there vLLM adds to what has no adapter, beside others that have one, what is in the last
    place (its index -1 is Python's last one).
    """
    if not adapters:
        return {}
    rank = max(adapter.rank for adapter in adapters.values())
    fitting = [allowed for allowed in RANKS if allowed >= rank]
    if not fitting:
        raise Unservable(f"a LoRA of rank {rank}: vLLM has room for ranks up to {RANKS[-1]}")
    return {"enable_lora": True, "max_loras": len(adapters) + on_cpu, "max_lora_rank": fitting[0]}


def lora_request(adapter: Adapter | None) -> Any:
    """What vLLM is told of it."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, adapter.number, adapter.folder)


def adapter_of(request: BackendInput, adapters: Mapping[str, Adapter]) -> Adapter | None:
    """The adapter that a request names. Raises `Unservable` for one that is not here."""
    name = request.routing.lora_name if request.routing else None
    if not name:
        return None
    if name not in adapters:
        there = ", ".join(adapters) or "none"
        raise Unservable(f"request {request.request_id}: routing.lora_name {name}: this engine has {there}")
    return adapters[name]


def layout_under(layout: str, adapter: Adapter | None) -> str:
    """The layout of blocks that were computed under an adapter."""
    return layout if adapter is None else f"{layout}+lora-{adapter.digest}"


def _read(name: str, number: int, folder: Path) -> Adapter:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = next(folder / file for file in WEIGHTS if (folder / file).exists())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        digest = xxhash.xxh3_128((folder / CONFIG).read_bytes())
        with weights.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise Unservable(f"pools.<name>.loras: {name}: no PEFT adapter in {folder}: {error!r}") from error
    return Adapter(name, number, str(folder), rank, digest.hexdigest()[:16])
