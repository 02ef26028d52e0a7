"""Sampling whose randomness is a function of (seed, choice, index), inside vLLM.

vLLM's own seeded sampling keeps a generator for each request, which starts anew when the request is resumed elsewhere. Here a request with
a seed is greedy for vLLM, and this processor leaves it one token to choose: the one that `workers.engines.torch.sampling` draws.
Penalties that look at the output are applied here, too: of a resumed request vLLM takes the first part of the output for its prompt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.protocol import SamplingOptions
from workers.engines.paged.runner import Draw
from workers.engines.torch.sampling import sample
from workers.engines.vllm.keyed import KEY, Keyed, is_keyed


@dataclass(slots=True)
class Row:
    """A request in vLLM's batch. `prompt`: as vLLM has it, with what was logged before; `output` is vLLM's own list and grows."""

    keyed: Keyed
    prompt: list[int]
    output: list[int]

    def draw(self) -> Draw:
        """What decides the next token."""
        return Draw(self.keyed.options, self.keyed.choice, len(self.keyed.done) + len(self.output), (), ())


class KeyedSampling(LogitsProcessor):  # type: ignore[misc]  # vLLM has no types here
    """See the module's docstring."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Nothing: what is under `KEY` is the engine's own."""

    def is_argmax_invariant(self) -> bool:
        """It decides what the greatest is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)
            if (told := (params.extra_args or {}).get(KEY)) is not None:
                self._rows[index] = Row(msgspec.convert(told, Keyed), prompt or [], output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [requests, vocabulary] with the penalties of each, and one token left where a seed decides."""
        for index, row in self._rows.items():
            penalize(logits[index], row)
        seeded = [(index, row) for index, row in self._rows.items() if is_keyed(row.keyed.options)]
        if seeded:
            indices = [index for index, _ in seeded]
            rows = logits[indices].float()
            for at, (_, row) in enumerate(seeded):
                drop_unlikely(rows[at], row.keyed.options)
            tokens = sample(rows, [row.draw() for _, row in seeded])
            logits[indices] = -torch.inf
            logits[indices, tokens] = 0.0
        return logits


def penalize(logits: torch.Tensor, row: Row) -> None:
    """The penalties in vLLM's order: repetition over prompt and output, then OpenAI's presence and frequency over all of the output.
    `logits` [vocabulary] is changed."""
    options = row.keyed.options
    if options.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *(token for token in row.output if token >= 0)}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / options.repetition_penalty, values * options.repetition_penalty)
    if options.presence_penalty == 0 and options.frequency_penalty == 0:
        return
    counts = Counter(token for token in (*row.keyed.done, *row.output) if 0 <= token < logits.shape[-1])
    if counts:
        tokens = torch.tensor(list(counts.keys()), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[tokens] -= options.frequency_penalty * times + options.presence_penalty


def drop_unlikely(logits: torch.Tensor, options: SamplingOptions) -> None:
    """min-p: what is less likely than so much of the most likely token cannot be drawn. `logits` [vocabulary] is changed."""
    if options.min_p > 0:
        scaled = logits / options.temperature
        limit = scaled.max() + torch.log(torch.tensor(options.min_p))
        logits[scaled < limit] = -torch.inf
