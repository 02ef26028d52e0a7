"""Decode attention on a CPU: over contiguous copies of the blocks that running answers read in every step.

A product of few queries with many keys is bound by memory. Gathering the keys of a sequence from its blocks in each layer
of each step reads and writes them once more, so what a group of answers has gathered is kept, and grows by a token a step
for as long as the same answers run together. The blocks stay the truth: they get every token too, and a copy is made anew
from them whenever a sequence joins or leaves its group. Copies take at most as much memory as the blocks themselves.

A product with keys that lie position by position is slow where they are in no cache; with the positions of each dimension side by
side it takes two thirds of the time. Turning the keys costs what about ten steps save, so a group of several answers does it once it
has lasted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from workers.engines.paged.runner import Row
from workers.engines.torch.cache import KVCache

TURNED_AFTER = 8  # steps
MIN_SPARE_TOKENS = 64  # room to grow before a copy is made anew; half of the length where that is more


class DenseGroup:
    """Keys and values of some sequences, longest first: `copies` [layers, 2, rows, kv_heads, capacity, head_dim].

    In a group of several that has lasted the keys are turned: [head_dim, capacity].
    """

    def __init__(self, rows: Sequence[Row], cache: KVCache, place: range, memory: torch.Tensor, capacity: int) -> None:
        self._geometry = geometry = cache.geometry
        self.place = place
        self.capacity = capacity
        shape = (geometry.layers, 2, len(rows), geometry.kv_heads, capacity, geometry.head_dim)
        self._copies = memory[place.start : place.stop].view(shape)
        self._slots = self._copies.view(-1, geometry.head_dim)
        self._tables: list[array[int]] = [row.table for row in rows]  # held, so that identity means the same sequence
        self._starts = np.array([row.start for row in rows])
        self._steps = 0
        heads = np.ascontiguousarray(np.arange(np.prod(shape[:4])).reshape(shape[:4]).swapaxes(2, 3))
        self._places = torch.from_numpy(heads * capacity + self._starts)  # of each next key and value in `slots`
        self._turned_places: torch.Tensor | None = None  # of each number of each next key
        self._fill(cache)

    def continues(self, rows: Sequence[Row]) -> bool:
        """Whether these rows are the same sequences, one token on, and there is room for it."""
        return (
            len(rows) == len(self._tables)
            and all(row.table is table for row, table in zip(rows, self._tables, strict=True))
            and [row.start for row in rows] == self._starts.tolist()
            and int(self._starts[0]) < self.capacity
        )

    def prepare(self, num_heads: int) -> None:
        """What a step needs in all layers: who sees what, which values each query sums."""
        if self._steps == TURNED_AFTER and len(self._starts) > 1:
            self._turn()
        geometry, rows, length = self._geometry, len(self._starts), int(self._starts[0]) + 1
        self._mask = None
        if self._starts[-1] + 1 < length:
            hidden = np.where(np.arange(length) <= self._starts[:, None], np.float32(0), np.float32(-np.inf))
            self._mask = torch.from_numpy(hidden.repeat(geometry.kv_heads, axis=0))[:, None]
        sharing = num_heads // geometry.kv_heads
        first = (np.arange(rows * geometry.kv_heads) * self.capacity).repeat(sharing)
        self._summed = torch.from_numpy((first[:, None] + np.arange(length)).reshape(-1))
        self._bags = torch.arange(rows * num_heads) * length

    def attend(self, layer: int, queries: torch.Tensor, new: torch.Tensor, scaling: float) -> torch.Tensor:
        """[rows, heads, dim] -> the same; `new` [2, kv_heads, rows, dim] is put in its place first.

        The weighted sum of values is one `embedding_bag`: it streams each value once, where a product of so few rows would
        copy them all into the order that it wants.
        """
        rows, heads, dim = queries.shape
        geometry, length = self._geometry, int(self._starts[0]) + 1
        keys, values = self._copies[layer]
        if self._turned_places is None:
            self._slots.index_copy_(0, self._places[layer].view(-1), new.reshape(-1, dim))
            seen = keys.view(-1, self.capacity, dim)[:, :length].transpose(1, 2)
        else:
            self._slots.view(-1).index_copy_(0, self._turned_places[layer], new[0].reshape(-1))
            self._slots.index_copy_(0, self._places[layer, 1].view(-1), new[1].reshape(-1, dim))
            seen = keys.view(-1, dim, self.capacity)[:, :, :length]
        queries = (queries * scaling).view(rows * geometry.kv_heads, -1, dim)
        scores = torch.bmm(queries, seen) if self._mask is None else torch.baddbmm(self._mask, queries, seen)
        weights = torch.softmax(scores, dim=-1).view(-1)
        summed = torch.embedding_bag(values.view(-1, dim), self._summed, self._bags, False, 0, False, weights)[0]
        return summed.view(rows, heads, dim)

    def advance(self) -> None:
        """The step is computed in all layers."""
        self._steps += 1
        self._starts += 1
        self._places += 1
        if self._turned_places is not None:
            self._turned_places += 1

    def _turn(self) -> None:
        """Lay out the keys with the positions of each dimension side by side, where they are."""
        dim = self._geometry.head_dim
        for keys in self._copies[:, 0]:
            keys.view(*keys.shape[:2], dim, -1).copy_(keys.transpose(2, 3).contiguous())
        position = torch.from_numpy(self._starts)
        first = (self._places[:, 0] - position)[..., None] * dim
        places = first + torch.arange(dim) * self.capacity + position[:, None]
        self._turned_places = places.view(self._geometry.layers, -1)

    def _fill(self, cache: KVCache) -> None:
        """Copy the blocks, as many for each row as it may grow to have; clear what is not a token of a sequence."""
        geometry, size = self._geometry, self._geometry.block_size
        tables = np.empty((len(self._tables), self.capacity // size), dtype=np.int64)
        for table, blocks in zip(tables, self._tables, strict=True):
            table[: len(blocks)] = blocks[: len(table)]
            table[len(blocks) :] = blocks[0]
        within = np.arange(geometry.rows_per_block).reshape(geometry.layers, 2, 1, geometry.kv_heads, 1)
        pieces = torch.from_numpy((tables[:, None, :] * geometry.rows_per_block + within).reshape(-1))
        torch.index_select(cache.pieces, 0, pieces, out=self._copies.view(len(pieces), -1))
        for row, start in enumerate(self._starts.tolist()):
            self._copies[:, :, row, :, start:] = 0  # masked out, but what is not a number would pass any mask


def can_copy(cache: KVCache) -> bool:
    """Whether copies pay: on a GPU memory is dearer than a gather, and `embedding_bag` sums in float32 only."""
    return cache.device.type == "cpu" and cache.geometry.dtype == torch.float32


class DenseMemory:
    """The groups of the last step, in memory as large as that of the blocks; only what was ever used of it is real."""

    def __init__(self, cache: KVCache, num_heads: int) -> None:
        self._cache = cache
        self._num_heads = num_heads
        self._memory = torch.empty(cache.blocks.numel(), dtype=cache.geometry.dtype)
        self._groups: list[DenseGroup] = []

    def groups_for(self, groups: Sequence[Sequence[Row]]) -> list[DenseGroup | None]:
        """A dense group for each of these groups of rows, ready for a step; None where there is no room for it."""
        found = [self._find(rows) for rows in groups]
        self._groups = [group for group in found if group is not None]
        for index, rows in enumerate(groups):
            group = found[index] or self._build(rows)
            if group is not None:
                group.prepare(self._num_heads)
            found[index] = group
        return found

    def advance(self) -> None:
        """The step is computed."""
        for group in self._groups:
            group.advance()

    def _find(self, rows: Sequence[Row]) -> DenseGroup | None:
        return next((group for group in self._groups if group.continues(rows)), None)

    def _build(self, rows: Sequence[Row]) -> DenseGroup | None:
        geometry = self._cache.geometry
        length = rows[0].start + 1
        blocks = -(-(length + max(MIN_SPARE_TOKENS, length // 2)) // geometry.block_size)
        needed = geometry.rows_per_block * len(rows) * blocks * geometry.block_size * geometry.head_dim
        place = self._free_place(needed)
        if place is None:
            return None
        group = DenseGroup(rows, self._cache, place, self._memory, blocks * geometry.block_size)
        self._groups.append(group)
        return group

    def _free_place(self, needed: int) -> range | None:
        """The first gap between the groups that is large enough."""
        start = 0
        for taken in sorted((group.place for group in self._groups), key=lambda place: place.start):
            if taken.start - start >= needed:
                break
            start = taken.stop
        return range(start, start + needed) if start + needed <= self._memory.numel() else None
