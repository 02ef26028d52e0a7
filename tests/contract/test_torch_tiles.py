"""Attention in tiles beside PyTorch's own, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engines.torch import onednn, tiles

pytestmark = pytest.mark.skipif(
    not onednn.is_usable(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN products"
)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 16), (8, 1, 128)])
@pytest.mark.parametrize(("tokens", "before"), [(128, 0), (300, 0), (128, 32), (257, 96), (130, 1_000)])
def test_tiles_give_what_pytorch_gives(heads: int, kv_heads: int, dim: int, tokens: int, before: int) -> None:
    length = before + tokens
    query = torch.randn(tokens, heads, dim).transpose(0, 1)  # strided, as projections give it
    keys, values = torch.randn(2, kv_heads, length + 5, dim)[:, :, :length]
    mask = torch.arange(length) <= torch.arange(before, length)[:, None]
    expected = scaled_dot_product_attention(
        query[None].double(), keys[None].double(), values[None].double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    attended = tiles.attend(query, keys, values, 0.3)
    assert attended.shape == (tokens, heads, dim)
    torch.testing.assert_close(attended.double(), expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
