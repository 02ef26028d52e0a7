"""A step of whole sequences that nothing goes on from: attention among the tokens of each, and no keys or values kept.

It stands in a model's keyword arguments where a `PagedStep` stands for generations, and has what models ask of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engines.torch import tiles


class RaggedStep:
    """All sequences in one row [1, total], each from position 0 on. `bounds`: where each begins in it, and behind the last one its end."""

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> None:
        lengths = [len(tokens) for tokens in sequences]
        self.bounds = [0, *accumulate(lengths)]
        flat = [token for tokens in sequences for token in tokens]
        self.input_ids = torch.tensor(flat, dtype=torch.int64).to(device)[None]
        self.position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)[None]
        self._tiled = [tiles.can_tile(device, dtype, length, length) for length in lengths]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Query [1, heads, total, dim], key and value [1, kv_heads, total, dim] -> [1, total, heads, dim]; the same in every layer."""
        together = torch.stack((key[0], value[0]))  # in one piece, as tiles need them
        parts = []
        for first, last, is_tiled in zip(self.bounds, self.bounds[1:], self._tiled, strict=False):
            own, (keys, values) = query[:, :, first:last], together[:, None, :, first:last]
            if is_tiled:
                parts.append(tiles.attend(own[0], keys[0], values[0], scaling or query.shape[-1] ** -0.5))
                continue
            attended = scaled_dot_product_attention(
                own, keys, values, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts)[None]
