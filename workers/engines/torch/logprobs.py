"""Log probabilities: of chosen tokens, the model's own, before temperature, penalties and cuts, but after the mask of a grammar; and of
the tokens of prompts, the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pipeline.logprobs import MOST
from workers.engines.paged.prompts import Asked, best_of, pack_scores
from workers.engines.paged.runner import Scored

SLICE_NUMBERS = (
    2**24
)  # logits of a prompt's positions that are there at once: 64 MiB, and as much again for their logarithms


def log_probabilities(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Of these rows of [rows, vocabulary], as a copy: what is done to the logits afterwards does not show."""
    return torch.log_softmax(logits[list(rows)], dim=-1)


def scored(logs: torch.Tensor, tokens: Sequence[int], asked: Sequence[int]) -> list[Scored]:
    """Each row's token with its log probability, and the `asked` likeliest of the row, the best first, of equals the lower id."""
    own = logs.gather(-1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].tolist()
    most = min(MOST, logs.shape[-1]) if any(asked) else 0  # never fewer: what a row gets does not depend on the others
    values, ids = (part.cpu().numpy() for part in logs.topk(most, dim=-1))
    best = [part.tolist() for part in best_of(ids, values, most)]
    return [
        Scored(token, value, list(zip(row_ids[:count], row[:count], strict=True)))
        for token, value, row_ids, row, count in zip(tokens, own, *best, asked, strict=True)
    ]


def told(logs: torch.Tensor, asked: Mapping[int, int], chosen: Sequence[int]) -> dict[int, Scored]:
    """`scored` of those rows that asked: by row, how many of the likeliest each wants."""
    rows = list(asked)
    found = scored(logs, [chosen[row] for row in rows], list(asked.values()))
    return dict(zip(rows, found, strict=True))


def score(
    asked: Sequence[tuple[int, Asked]],
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
) -> None:
    """Leave in each of `asked` its records: `hidden` [positions, hidden size], where its first position is the one beside it; `head`
    makes their logits. A few positions at a time, since all their logits together may be larger than the model."""
    most = max(1, SLICE_NUMBERS // vocab_size)
    for first, one in asked:
        count = len(one.targets)
        parts = [
            _records(head(hidden[first + at : first + min(at + most, count)]), one.targets[at : at + most], one.top)
            for at in range(0, count, most)
        ]
        one.records = b"".join(parts)


def _records(logits: torch.Tensor, targets: list[int], top: int) -> bytes:
    """Of the positions of `logits` [positions, vocabulary], whose next tokens are `targets`."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    own = logs.gather(-1, torch.tensor(targets, device=logs.device)[:, None])
    ranks = (logs >= own).sum(dim=-1)
    values, ids = (part.cpu().numpy() for part in logs.topk(min(MOST, logs.shape[-1]) if top else 0, dim=-1))
    return pack_scores(own[:, 0].cpu().numpy(), ranks.cpu().numpy(), *best_of(ids, values, top))
