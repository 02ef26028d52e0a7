"""The memory of the KV blocks: one tensor, block-major, so that a block with all its layers is one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape of the keys and values of a model in blocks."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block, all layers, keys and values."""
        return self.rows_per_block * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def rows_per_block(self) -> int:
        """(layer, key or value, head) triples of a block; each is `block_size` x `head_dim` numbers in one piece."""
        return self.layers * 2 * self.kv_heads


class KVCache:
    """`blocks`: [num_blocks, layers, 2, kv_heads, block_size, head_dim].

    `pieces` views the same memory as one row of `block_size * head_dim` for each (block, layer, key or value, head), and
    `slots` as one row of `head_dim` for each slot of those.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        shape = (num_blocks, geometry.layers, 2, geometry.kv_heads, geometry.block_size, geometry.head_dim)
        self.blocks = torch.zeros(shape, dtype=geometry.dtype, device=device)
        self.pieces = self.blocks.view(num_blocks * geometry.rows_per_block, geometry.block_size * geometry.head_dim)
        self.slots = self.blocks.view(-1, geometry.head_dim)
        self._bytes = self.blocks.view(num_blocks, -1).view(torch.uint8)

    def copy(self, source: int, target: int) -> None:
        """Copy one block."""
        self.blocks[target].copy_(self.blocks[source])

    def clear(self, blocks: Sequence[int]) -> None:
        """Set blocks to zero."""
        self.blocks[list(blocks)] = 0

    def gather(self, blocks: Sequence[int], out: memoryview) -> None:
        """Write these blocks, in order, into `out`."""
        target = np.frombuffer(out, dtype=np.uint8).reshape(len(blocks), -1)
        if self.device.type == "cpu":
            memory = self._bytes.numpy()
            for place, block in zip(target, blocks, strict=True):
                place[:] = memory[block]
        else:
            gathered = self._bytes.index_select(0, torch.tensor(blocks, device=self.device))
            torch.from_numpy(target).copy_(gathered)

    def scatter(self, data: memoryview, blocks: Sequence[int]) -> None:
        """Fill these blocks, in order, from `data`, which may be read-only."""
        source = np.frombuffer(data, dtype=np.uint8).reshape(len(blocks), -1)
        if self.device.type == "cpu":
            memory = self._bytes.numpy()
            for piece, block in zip(source, blocks, strict=True):
                memory[block] = piece
        else:
            pieces = torch.from_numpy(source.copy()).to(self.device)
            self._bytes.index_copy_(0, torch.tensor(blocks, device=self.device), pieces)
            torch.cuda.synchronize(self.device)
