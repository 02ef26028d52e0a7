"""Log probabilities of chosen tokens: the model's own, before temperature, penalties and cuts, but after the mask of a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.logprobs import MOST
from workers.engines.paged.runner import Scored


def log_probabilities(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Of these rows of [rows, vocabulary], as a copy: what is done to the logits afterwards does not show."""
    return torch.log_softmax(logits[list(rows)], dim=-1)


def scored(logs: torch.Tensor, tokens: Sequence[int], asked: Sequence[int]) -> list[Scored]:
    """Each row's token with its log probability, and the `asked` likeliest of the row, the best first, of equals the lower id."""
    own = logs.gather(-1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].tolist()
    most = min(MOST, logs.shape[-1]) if any(asked) else 0  # never fewer: what a row gets does not depend on the others
    values, ids = (part.cpu().numpy() for part in logs.topk(most, dim=-1))
    order = np.lexsort((ids, -values))
    best = np.take_along_axis(ids, order, -1).tolist(), np.take_along_axis(values, order, -1).tolist()
    return [
        Scored(token, value, list(zip(row_ids[:count], row[:count], strict=True)))
        for token, value, row_ids, row, count in zip(tokens, own, *best, asked, strict=True)
    ]


def told(logs: torch.Tensor, asked: Mapping[int, int], chosen: Sequence[int]) -> dict[int, Scored]:
    """`scored` of those rows that asked: by row, how many of the likeliest each wants."""
    rows = list(asked)
    found = scored(logs, [chosen[row] for row in rows], list(asked.values()))
    return dict(zip(rows, found, strict=True))
