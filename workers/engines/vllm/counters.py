"""The figures of the vLLM engine, from what vLLM says of each step."""

from __future__ import annotations

import time
from typing import Any

from pipeline.protocol import BackendInput
from workers.engine import EngineStats
from workers.transfer import TransferStats


class Counters:
    """Counts; `stats` is a moment of it."""

    def __init__(self) -> None:
        self._running = self._waiting = 0
        self._blocks_used = self._blocks_free = 0
        self._prefix_hit_tokens = self._prefix_query_tokens = 0
        self._prompt_tokens_computed = self._output_tokens = 0
        self._preemptions = self._steps = 0
        self._step_ms = 0.0
        self._last_s = 0.0

    def count(self, step: Any, blocks_used: int, blocks_free: int) -> None:
        """One step (vLLM's `EngineCoreOutputs`), and the blocks after it."""
        self._steps += 1
        self._blocks_used, self._blocks_free = blocks_used, blocks_free
        now_s = time.perf_counter()
        if self._running:  # an idle engine's pause is no step
            self._step_ms += 0.1 * ((now_s - self._last_s) * 1000 - self._step_ms)
        self._last_s = now_s
        self._output_tokens += sum(len(output.new_token_ids) for output in step.outputs)
        if (told := step.scheduler_stats) is not None:
            self._running = told.num_running_reqs
            self._waiting = told.num_waiting_reqs + getattr(told, "num_skipped_waiting_reqs", 0)
        for output in step.outputs:
            self._preemptions += sum(event.type.name == "PREEMPTED" for event in output.events or ())

    def count_prompt(self, request: BackendInput, cached_tokens: int, local_tokens: int) -> None:
        """A prompt is there: so many of its tokens were not computed, so many of those were in the prefix cache."""
        self._prefix_query_tokens += len(request.token_ids)
        self._prefix_hit_tokens += local_tokens
        self._prompt_tokens_computed += len(request.token_ids) - cached_tokens

    def rest(self, blocks_used: int, blocks_free: int) -> None:
        """Nothing is left to step."""
        self._running = self._waiting = 0
        self._blocks_used, self._blocks_free = blocks_used, blocks_free

    def stats(self, transfer: TransferStats) -> EngineStats:
        """The figures now."""
        return EngineStats(
            running=self._running,
            waiting=self._waiting,
            blocks_used=self._blocks_used,
            blocks_free=self._blocks_free,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            prompt_tokens_computed=self._prompt_tokens_computed,
            output_tokens=self._output_tokens,
            preemptions=self._preemptions,
            handles_exported=transfer.handles,
            handle_bytes=transfer.bytes_used,
            handle_bytes_free=transfer.bytes_free,
            steps=self._steps,
            step_ms=self._step_ms,
        )
