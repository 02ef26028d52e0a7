"""vLLM without Baton: two engines in turn, or a prefill and a decode engine with vLLM's NixlConnector."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.fleet import Fleet, free_port
from benchmarks.gpu.http import is_ready
from benchmarks.gpu.load import Seen, Target
from benchmarks.gpu.options import environment, extra_engine_arguments, shape_of

KV_BYTES_ON_CPU = 256 << 20


class PlainSystem:
    """Two engines of vLLM, each behind a small server."""

    def __init__(self, arguments: argparse.Namespace, fleet: Fleet, model: Path, *, has_nixl: bool) -> None:
        self._arguments = arguments
        self._fleet = fleet
        self._model = model
        self._has_nixl = has_nixl
        self.target = Target((free_port(), free_port()), is_pair=has_nixl)

    async def __aenter__(self) -> PlainSystem:
        for place, port in enumerate(self.target.ports):
            variables = environment(self._arguments, place)
            if self._has_nixl:
                variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
            words = [str(port), json.dumps(self._engine_arguments())]
            self._fleet.spawn(f"vllm-{place}", "benchmarks.gpu.vllm_server", words, variables)
        await self._fleet.until(self._is_up, self._arguments.start_s, "the engines were ready")
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def _is_up(self) -> bool:
        return all([await is_ready(port) for port in self.target.ports])

    def _engine_arguments(self) -> dict[str, Any]:
        asked, shape = self._arguments, shape_of(self._arguments)
        found: dict[str, Any] = {
            "model": str(self._model),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": shape.dtype,
            "max_num_seqs": asked.num_seqs,
            "max_num_batched_tokens": asked.batched_tokens,
            "gpu_memory_utilization": asked.gpu_memory,
            "disable_log_stats": True,
            **extra_engine_arguments(asked),
        }
        if asked.block_size:
            found["block_size"] = asked.block_size
        if asked.device == "cpu":
            found |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_BYTES_ON_CPU}
        if self._has_nixl:
            where = {"kv_buffer_device": "cpu"} if asked.device == "cpu" else {}
            found["kv_transfer_config"] = {"kv_connector": "NixlConnector", "kv_role": "kv_both", **where}
        return found

    async def before(self) -> None:
        """Nothing is counted here."""

    async def after(self, seen: Sequence[Seen]) -> dict[str, Any]:
        """See `before`."""
        return {}
