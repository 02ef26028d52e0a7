"""Sampling whose randomness is a function of (seed, choice, index), inside vLLM.

vLLM's own seeded sampling keeps a generator for each request, which starts anew when the request is resumed elsewhere. Here a request with
a seed is greedy for vLLM, and this processor leaves it one token to choose: the one that `workers.engines.torch.sampling` draws.
Penalties that look at the output are applied here, too: of a resumed request vLLM takes the first part of the output for its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from workers.engines.paged.runner import Draw
from workers.engines.paged.shaping import TokenCounts, counts_of
from workers.engines.torch.penalties import penalize
from workers.engines.torch.sampling import sample
from workers.engines.vllm.keyed import KEY, Keyed, is_keyed


@dataclass(slots=True)
class Row:
    """A request in vLLM's batch. `output` is vLLM's own list, without what was logged before, and grows."""

    keyed: Keyed
    output: list[int]
    counts: TokenCounts | None

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
                self._rows[index] = row_of(msgspec.convert(told, Keyed), prompt or [], output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [requests, vocabulary] with the penalties of each, and one token left where a seed decides."""
        penalized = []
        for index, row in self._rows.items():
            if row.counts is not None:
                row.counts.follow(row.output)
                penalized.append((index, row.keyed.options, row.counts))
        if penalized:
            penalize(logits, penalized)
        seeded = [(index, row) for index, row in self._rows.items() if is_keyed(row.keyed.options)]
        if seeded:
            indices = [index for index, _ in seeded]
            tokens = sample(logits[indices].float(), [row.draw() for _, row in seeded])
            logits[indices] = -torch.inf
            logits[indices, tokens] = 0.0
        return logits


def row_of(keyed: Keyed, prompt: list[int], output: list[int]) -> Row:
    """A request that joins the batch. What was logged before is a part of the output for the penalties."""
    return Row(keyed, output, counts_of(keyed.options, prompt, keyed.done))
