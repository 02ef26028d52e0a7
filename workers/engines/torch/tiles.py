"""Causal attention of many tokens of one sequence on a CPU, tile by tile, with oneDNN's products.

A tile is some consecutive queries against all keys that they see, so only the end of its scores is masked, and nothing is computed that
the mask would hide but half of a square. PyTorch's own attention does the same with MKL's products.
"""

from __future__ import annotations

import torch

from workers.engines.torch import onednn

TILE = 128  # queries of a head in a tile; with fewer in all, PyTorch's attention is as fast
MAX_LENGTH = 2**14  # the scores of a tile exist as a whole: 8 MiB for each head with the same keys


def can_tile(device: torch.device, dtype: torch.dtype, tokens: int, length: int) -> bool:
    """Whether tiles serve for so many queries, the last of `length` positions."""
    return tokens >= TILE and length <= MAX_LENGTH and onednn.is_usable(device, dtype)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Query [heads, tokens, dim] of the last positions; keys, values [kv_heads, length, dim] -> [tokens, heads, dim]."""
    heads, tokens, dim = query.shape
    kv_heads, length, _ = keys.shape
    before = length - tokens
    queries = query.transpose(0, 1).view(tokens, kv_heads, -1, dim)
    attended = query.new_empty(queries.shape)
    hidden = query.new_full((TILE, TILE), -torch.inf).triu_(1)[:, None]
    start = before
    while start < length:
        end = min(start - start % TILE + TILE, length)  # at whole tiles: oneDNN compiles once for each shape
        own, count = slice(start - before, end - before), end - start
        for head in range(kv_heads):
            rows = queries[own, head] * scaling
            scores = onednn.product(rows.reshape(-1, dim), keys[head, :end])
            scores.view(count, -1, end)[..., start:] += hidden[:count, :, :count]
            summed = onednn.product(scores.softmax(dim=-1), values[head, :end].t())
            attended[own, head] = summed.view(rows.shape)
        start = end
    return attended.view(tokens, heads, dim)
