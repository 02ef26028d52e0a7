"""Contiguous copies of the blocks that running answers read in every step.

Attention kernels want the keys of a sequence in one piece; gathering them from their blocks in each layer of each step
costs as much as the attention itself. So what a group of answers has gathered is kept, and grows by a token a step for as
long as the same answers run together. The blocks stay the truth: they get every token too, and a copy is made anew from
them whenever a sequence joins or leaves its group. Copies take at most as much memory as the blocks themselves.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from workers.engines.paged.runner import Row
from workers.engines.torch.cache import KVCache

SPARE_TOKENS = 64  # room to grow before a copy is made anew


class DenseGroup:
    """Keys and values of some sequences: `copies` [layers, 2, rows, kv_heads, capacity, head_dim]."""

    def __init__(self, rows: Sequence[Row], cache: KVCache, storage: torch.Tensor, capacity: int) -> None:
        geometry = cache.geometry
        shape = (geometry.layers, 2, len(rows), geometry.kv_heads, capacity, geometry.head_dim)
        self.storage = storage
        self.copies = storage[: int(np.prod(shape))].view(shape)
        self.capacity = capacity
        self._tables: list[array[int]] = [row.table for row in rows]  # held, so that identity means the same sequence
        self._next = [row.start for row in rows]
        self._fill(rows, cache)
        lead = np.arange(geometry.layers * 2 * len(rows) * geometry.kv_heads).reshape(geometry.layers, 2, len(rows), -1)
        places = lead * capacity + np.array(self._next)[:, None]
        self._places = torch.from_numpy(places.swapaxes(2, 3).reshape(geometry.layers, -1).copy())
        self._slots = self.copies.view(-1, geometry.head_dim)

    def continues(self, rows: Sequence[Row]) -> bool:
        """Whether these rows are the same sequences, one token on, and there is room for it."""
        return (
            len(rows) == len(self._tables)
            and all(row.table is table for row, table in zip(rows, self._tables, strict=True))
            and all(row.start == start for row, start in zip(rows, self._next, strict=True))
            and max(self._next) < self.capacity
        )

    def append(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Put the new token of each row, [2, kv_heads, rows, head_dim], in its place; returns the layer's copies."""
        self._slots.index_copy_(0, self._places[layer], new.reshape(-1, new.shape[-1]))
        return self.copies[layer]

    def advance(self) -> None:
        """The step is computed in all layers."""
        self._places += 1
        self._next = [start + 1 for start in self._next]

    def _fill(self, rows: Sequence[Row], cache: KVCache) -> None:
        size = cache.geometry.block_size
        for index, row in enumerate(rows):
            for block, place in zip(row.table, range(0, row.start, size), strict=False):
                count = min(size, row.start - place)
                self.copies[:, :, index, :, place : place + count] = cache.blocks[block, :, :, :, :count]
            self.copies[:, :, index, :, row.start :] = 0  # masked out, but what is not a number would pass any mask


class DenseMemory:
    """The groups of the last step, and the memory of those that ended."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._groups: list[DenseGroup] = []
        self._spare: list[torch.Tensor] = []

    def groups_for(self, groups: Sequence[Sequence[Row]]) -> list[DenseGroup | None]:
        """A dense group for each of these groups of rows; None where memory does not allow it."""
        kept: list[DenseGroup | None] = [self._find(rows) for rows in groups]
        self._spare += [group.storage for group in self._groups if group not in kept]
        budget = self._cache.blocks.numel() - sum(group.storage.numel() for group in kept if group is not None)
        for index, rows in enumerate(groups):
            if kept[index] is None:
                kept[index] = group = self._build(rows, budget)
                budget -= group.storage.numel() if group is not None else 0
        self._groups = [group for group in kept if group is not None]
        return kept

    def advance(self) -> None:
        """The step is computed."""
        for group in self._groups:
            group.advance()

    def _find(self, rows: Sequence[Row]) -> DenseGroup | None:
        return next((group for group in self._groups if group.continues(rows)), None)

    def _build(self, rows: Sequence[Row], budget: int) -> DenseGroup | None:
        geometry = self._cache.geometry
        capacity = max(row.start for row in rows) + SPARE_TOKENS
        needed = geometry.layers * 2 * len(rows) * geometry.kv_heads * capacity * geometry.head_dim
        if needed > budget:
            self._spare.clear()
            return None
        self._spare.sort(key=torch.Tensor.numel)
        storage = self._spare.pop() if self._spare else torch.empty(0, dtype=geometry.dtype)
        if storage.numel() < needed:
            storage = torch.empty(min(budget, needed + needed // 4), dtype=geometry.dtype)
        return DenseGroup(rows, self._cache, storage, capacity)
