"""From logits to tokens, in vLLM's order.

1. The mask of a grammar. What is left are the log probabilities that are told.
2. Tokens that may not come yet (`min_tokens`), `logit_bias`, then the penalties: repetition, frequency, presence.
3. The greatest where the temperature is 0. Else temperature, min-p, top-k, top-p, then the inverse of the cumulative distribution
   in order of token ids, in float64.

The result for a row does not depend on what else is in the batch, up to the noise of the logits themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from workers.engines.paged.randomness import uniforms
from workers.engines.paged.runner import Chosen, Draw, RowFailure
from workers.engines.paged.shaping import Shaping
from workers.engines.torch.grammars import GrammarConstraint, mask
from workers.engines.torch.logprobs import log_probabilities, told
from workers.engines.torch.penalties import add_bias, penalize

NOT_FINITE = RowFailure("the model gave logits that are not finite")
Shaped = list[tuple[int, Shaping]]  # rows that are shaped, and by what


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Chosen]:
    """One token id for each draw from its row of `logits` [draws, vocabulary], which are changed; scored where a draw asks for it."""
    shaped = [(row, draw.shaping) for row, draw in enumerate(draws) if draw.shaping is not None]
    failures = constrain(logits, shaped) if shaped else {}
    asked = {row: shaping.logprobs for row, shaping in shaped if shaping.logprobs is not None}
    logs = log_probabilities(logits, list(asked)) if asked else None
    ban(logits, draws)
    if shaped:
        shape(logits, shaped)
    best = logits.amax(dim=-1)
    chosen = tokens_of(logits, draws)
    scores = told(logs, asked, chosen) if logs is not None else {}
    sound = torch.isfinite(best).tolist()
    failures |= {row: NOT_FINITE for row, is_sound in enumerate(sound) if not is_sound and row not in failures}
    return [failures[row] if row in failures else scores.get(row, token) for row, token in enumerate(chosen)]


def constrain(logits: torch.Tensor, shaped: Shaped) -> dict[int, RowFailure]:
    """Take in the tokens since the last step and leave in each row what its grammar allows; returns the rows whose grammar has failed."""
    for _, shaping in shaped:
        shaping.follow()
    rows = [(row, shaping.constraint) for row, shaping in shaped if shaping.constraint is not None]
    return mask(logits, cast("list[tuple[int, GrammarConstraint]]", rows)) if rows else {}


def ban(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """What may not come now cannot be chosen, unless a grammar leaves nothing else. `logits` are changed."""
    for row, draw in enumerate(draws):
        banned = [token for token in draw.banned if token < logits.shape[-1]]
        if banned:
            kept = logits[row, banned]
            logits[row, banned] = -torch.inf
            if draw.shaping is not None and draw.shaping.constraint is not None and logits[row].amax() == -torch.inf:
                logits[row, banned] = kept


def shape(logits: torch.Tensor, shaped: Shaped) -> None:
    """Bias and penalties. `logits` are changed."""
    biased = [(row, shaping.bias) for row, shaping in shaped if shaping.bias is not None]
    if biased:
        add_bias(logits, biased)
    penalized = [(row, shaping.options, shaping.counts) for row, shaping in shaped if shaping.counts is not None]
    if penalized:
        penalize(logits, penalized)


def tokens_of(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The greatest of each row, or a random one where its temperature is above 0."""
    chosen: list[int] = most_likely(logits)
    sampling = [row for row, draw in enumerate(draws) if draw.options.temperature > 0]
    if sampling:
        sampled = sample(logits[sampling], [draws[row] for row in sampling])
        for row, token in zip(sampling, sampled, strict=True):
            chosen[row] = token
    return chosen


def most_likely(logits: torch.Tensor) -> list[int]:
    """The first of the best of each row. On a CPU numpy finds it ten times faster."""
    if logits.device.type == "cpu":
        found: list[int] = logits.numpy().argmax(axis=-1).tolist()
        return found
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """A random token id for each row, keyed by the seed, choice and index of its draw."""
    device = logits.device
    temperatures = torch.tensor([draw.options.temperature for draw in draws], dtype=torch.float64, device=device)
    weights = torch.softmax(logits.double() / temperatures[:, None], dim=-1)
    drop_unlikely(weights, draws)
    limited = [row for row, draw in enumerate(draws) if draw.options.top_k > 0 or draw.options.top_p < 1]
    if limited:
        weights[limited] = keep_likely(weights[limited], [draws[row] for row in limited])
    totals = weights.cumsum(dim=-1)
    points = torch.from_numpy(uniforms(draws)).to(device) * totals[:, -1]
    tokens = torch.searchsorted(totals, points[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1).tolist()


def drop_unlikely(weights: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Set to zero what min-p leaves out: what is less likely than so much of the most likely token. `weights` are changed."""
    if any(draw.options.min_p > 0 for draw in draws):
        shares = torch.tensor([draw.options.min_p for draw in draws], dtype=torch.float64, device=weights.device)
        weights[weights < shares[:, None] * weights.amax(dim=-1, keepdim=True)] = 0


def keep_likely(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Set to zero what top-k and top-p leave out; of the most likely token something always remains."""
    device = weights.device
    size = weights.shape[-1]
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([draw.options.top_k or size for draw in draws], device=device)
    keep = torch.arange(size, device=device) < top_k[:, None]
    descending = descending * keep
    top_p = torch.tensor([draw.options.top_p for draw in draws], dtype=torch.float64, device=device)
    before = descending.cumsum(dim=-1) - descending
    keep &= before < top_p[:, None] * descending.sum(dim=-1, keepdim=True)
    keep[:, 0] = True
    return torch.zeros_like(weights).scatter_(-1, order, descending * keep)
