"""The figures of the vLLM engine, from what vLLM says of each step."""

from __future__ import annotations

from typing import Any

from pipeline.protocol import BackendInput
from workers.engine import EngineStats
from workers.engines.step_times import StepTimes
from workers.engines.vllm.core import Load
from workers.transfer import TransferStats


class Counters:
    """Counts; `stats` is a moment of it."""

    def __init__(self) -> None:
        self._prefix_hit_tokens = self._prefix_query_tokens = 0
        self._prompt_tokens_computed = self._output_tokens = 0
        self._preemptions = 0
        self._times = StepTimes()

    def count(self, step: Any, took_s: float) -> None:
        """One step (vLLM's `EngineCoreOutputs`), which took so long."""
        self._times.add(took_s)
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
            steps=self._times.steps,
            busy_s=self._times.busy_s,
            step_ms=self._times.average_ms,
        )
