"""The memory of the KV blocks: one tensor, block-major, so that a block with all its layers is one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.engines.device_copies import DeviceCopies
from workers.transfer import Memory, host


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
        self._copies = DeviceCopies([self._bytes]) if device.type == "cuda" else None

    def copy(self, source: int, target: int) -> None:
        """Copy one block."""
        self.blocks[target].copy_(self.blocks[source])

    def clear(self, blocks: Sequence[int]) -> None:
        """Set blocks to zero."""
        self.blocks[list(blocks)] = 0

    def _now(self) -> torch.cuda.Event:
        """This moment of the device's own stream, on which steps, `copy` and `clear` run: what they write or read comes before a copy."""
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """Write these blocks, in order, into `out`."""
        if self._copies is not None:
            self._copies.gather(blocks, out, self._now())
            return
        target, memory = np.frombuffer(host(out), dtype=np.uint8).reshape(len(blocks), -1), self._bytes.numpy()
        for place, block in zip(target, blocks, strict=True):
            place[:] = memory[block]

    def scatter(self, data: Memory, blocks: Sequence[int]) -> None:
        """Fill these blocks, in order, from `data`, which may be read-only."""
        if self._copies is not None:
            self._copies.scatter(data, blocks, after=self._now())
            return
        source, memory = np.frombuffer(host(data), dtype=np.uint8).reshape(len(blocks), -1), self._bytes.numpy()
        for piece, block in zip(source, blocks, strict=True):
            memory[block] = piece
