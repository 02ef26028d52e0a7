"""What changes the logits of a choice before one is chosen: its bias and its penalties, for all rows of a step in one go.

As in vLLM: the bias first, then the repetition penalty over prompt and output (Keskar et al., CTRL, 2019), then OpenAI's frequency
and presence penalties over the output alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.protocol import SamplingOptions
from workers.engines.paged.shaping import Ids, TokenCounts, Values


def add_bias(logits: torch.Tensor, rows: Sequence[tuple[int, tuple[Ids, Values]]]) -> None:
    """Add to the logits of some rows of [rows, vocabulary] what the bias of each says of its tokens. `logits` is changed."""
    sizes = [len(ids) for _, (ids, _) in rows]
    at = _at(logits, [row for row, _ in rows], sizes, [ids for _, (ids, _) in rows])
    values = np.concatenate([values for _, (_, values) in rows])
    logits[at] += torch.from_numpy(values).to(logits.device, logits.dtype)


def penalize(logits: torch.Tensor, rows: Sequence[tuple[int, SamplingOptions, TokenCounts]]) -> None:
    """Apply the penalties of some rows of [rows, vocabulary] to the tokens that each has seen. `logits` is changed."""
    sizes = [len(counts.ids) for _, _, counts in rows]
    at = _at(logits, [row for row, _, _ in rows], sizes, [counts.ids for _, _, counts in rows])
    repetition, frequency, presence = (
        _spread(logits, [getattr(options, name) for _, options, _ in rows], sizes)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    )
    times = torch.from_numpy(np.concatenate([counts.times for _, _, counts in rows])).to(logits.device, logits.dtype)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * times - presence * (times > 0)


def _at(
    logits: torch.Tensor, rows: Sequence[int], sizes: Sequence[int], ids: Sequence[Ids]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of (row, token) pairs, none of them twice."""
    where: NDArray[np.int64] = np.repeat(np.array(rows, dtype=np.int64), sizes)
    return torch.from_numpy(where).to(logits.device), torch.from_numpy(np.concatenate(ids)).to(logits.device)


def _spread(logits: torch.Tensor, values: Sequence[float], sizes: Sequence[int]) -> torch.Tensor:
    """One value a row, repeated for each of its tokens."""
    return torch.from_numpy(np.repeat(np.array(values), sizes)).to(logits.device, logits.dtype)
