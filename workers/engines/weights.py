"""What tells the weights of two engines apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash

SAMPLED_NUMBERS = 256  # of each weight


def add_weights(digest: xxhash.xxh3_128, weights: Iterable[tuple[str, Any]]) -> None:
    """Add named tensors to a digest: their shapes, their types, and a sample of each."""
    for name, weight in weights:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_NUMBERS)].float().cpu().numpy()
        digest.update(f"{name}/{tuple(weight.shape)}/{weight.dtype}".encode())
        digest.update(sample.tobytes())
