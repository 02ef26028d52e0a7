"""The figures of the vLLM engine, from what vLLM says of each step."""

from __future__ import annotations

import time
from typing import Any

from pipeline.protocol import BackendInput
from workers.engine import EngineStats
from workers.engines.vllm.core import Load
from workers.transfer import TransferStats

LONGEST_STEP_S = 1.0


class Counters:
    """Counts; `stats` is a moment of it."""

    def __init__(self) -> None:
        self._prefix_hit_tokens = self._prefix_query_tokens = 0
        self._prompt_tokens_computed = self._output_tokens = 0
        self._preemptions = self._steps = 0
        self._step_ms = 0.0
        self._last_s = 0.0

    def count(self, step: Any) -> None:
        """One step (vLLM's `EngineCoreOutputs`)."""
        self._steps += 1
        now_s = time.perf_counter()
        if now_s - self._last_s < LONGEST_STEP_S:  # an idle engine's pause is no step
            self._step_ms += 0.1 * ((now_s - self._last_s) * 1000 - self._step_ms)
        self._last_s = now_s
        self._output_tokens += sum(len(output.new_token_ids) for output in step.outputs)
        for output in step.outputs:
            self._preemptions += sum(event.type.name == "PREEMPTED" for event in output.events or ())

    def count_prompt(self, request: BackendInput, cached_tokens: int, local_tokens: int) -> None:
        """A prompt is there: so many of its tokens were not computed, so many of those were in the prefix cache."""
        self._prefix_query_tokens += len(request.token_ids)
        self._prefix_hit_tokens += local_tokens
        self._prompt_tokens_computed += len(request.token_ids) - cached_tokens

    def stats(self, load: Load, transfer: TransferStats) -> EngineStats:
        """The figures now."""
        return EngineStats(
            running=load.running,
            waiting=load.waiting,
            blocks_used=load.blocks_used,
            blocks_free=load.blocks_free,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            prompt_tokens_computed=self._prompt_tokens_computed,
            output_tokens=self._output_tokens,
            preemptions=self._preemptions,
            handles_exported=transfer.handles,
            handle_bytes=transfer.bytes_used,
            handle_bytes_free=transfer.bytes_free,
            fetched=transfer.fetched,
            steps=self._steps,
            step_ms=self._step_ms,
        )
