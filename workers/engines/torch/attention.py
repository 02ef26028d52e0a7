"""Attention over paged blocks for a ragged row of tokens, as Hugging Face's attention interface calls it.

The model runs on one row [1, total] that holds all rows of a step: first those of one token, longest sequence first, then
the chunks. What a step's attention needs to know travels through the model's keyword arguments as a `PagedStep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from pipeline.errors import Unservable
from workers.engines.paged.runner import Row
from workers.engines.torch import tiles
from workers.engines.torch.cache import KVCache
from workers.engines.torch.dense import DenseGroup, DenseMemory
from workers.engines.torch.ragged import RaggedStep

ATTENTION_NAME = "baton_paged"
STEP_ARGUMENT = "paged_step"
UNIMPLEMENTED = ("softcap", "s_aux", "position_bias")  # arguments by which models ask for more than plain attention

Ids = NDArray[np.int64]


@dataclass(slots=True)
class DecodeGroup:
    """Rows `first` to `last` of one token each, of similar length, padded to the blocks of the longest."""

    first: int
    last: int
    length: int  # tokens of the longest
    mask: (
        torch.Tensor | None
    )  # [rows, 1, 1, length], True where the sequence has a token; None where all are equally long
    dense: DenseGroup | None
    pieces: torch.Tensor | None  # [layers, 2 * rows * kv_heads * blocks] rows of `KVCache.pieces`


@dataclass(slots=True)
class Chunk:
    """Tokens `first` to `last` of the ragged row are consecutive positions of one sequence."""

    first: int
    last: int
    pieces: torch.Tensor | None  # as above, of all blocks up to the chunk's end; None where nothing precedes the chunk
    mask: torch.Tensor | None  # [tokens, length]; None where nothing precedes the chunk, or in tiles
    length: int
    is_tiled: bool


class PagedStep:
    """Everything about a step that does not depend on the layer. Built on the CPU, one copy a tensor to the device."""

    def __init__(self, rows: Sequence[Row], cache: KVCache, memory: DenseMemory | None = None) -> None:
        self._cache = cache
        self._memory = memory
        self._size = cache.geometry.block_size
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index].token_ids) > 1, -rows[index].start))
        ragged = [rows[index] for index in order]
        counts = [len(row.token_ids) for row in ragged]
        ends = np.cumsum(counts)
        self.input_ids = self._tensor([token for row in ragged for token in row.token_ids])[None]
        positions = np.array([place for row in ragged for place in range(row.start, row.start + len(row.token_ids))])
        self.position_ids = self._tensor(positions)[None]
        self._slots = self._write_slots(ragged, positions)
        decoding = sum(count == 1 for count in counts)
        self.groups = self._decode_groups(ragged[:decoding])
        self.chunks = [self._chunk(row, int(end)) for row, end in zip(ragged[decoding:], ends[decoding:], strict=True)]
        last_of = dict(zip(order, ends - 1, strict=True))
        sampling = [last_of[index] for index, row in enumerate(rows) if row.draws]  # none in a step of chunks alone
        self.sampling = self._tensor(np.array(sampling, dtype=np.int64))
        self.asked = [  # with the place of the first position that each asks for in the ragged row
            (int(last_of[index]) + 1 - len(row.token_ids) + row.asked.first - row.start, row.asked)
            for index, row in enumerate(rows)
            if row.asked is not None
        ]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Query [1, heads, total, dim], key and value [1, kv_heads, total, dim] -> [1, total, heads, dim].

        The step's keys and values are written to their blocks first.
        """
        new = torch.stack((key[0], value[0]))
        self._cache.slots.index_copy_(0, self._slots[layer], new.view(-1, new.shape[-1]))
        parts = [self._decode(group, layer, query, new, scaling) for group in self.groups]
        parts += [self._prefill(chunk, layer, query, new, scaling) for chunk in self.chunks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _decode(
        self, group: DecodeGroup, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """[rows, heads, dim]. The heads that share a key head are the queries of one attention."""
        rows, heads, dim = group.last - group.first, query.shape[1], query.shape[3]
        queries = query[0, :, group.first : group.last].transpose(0, 1)
        if group.dense is not None:
            return group.dense.attend(layer, queries, new[:, :, group.first : group.last], scaling or dim**-0.5)
        assert group.pieces is not None
        keys, values = self._gather(group.pieces[layer], rows)[..., : group.length, :]
        queries = queries.reshape(rows, keys.shape[1], -1, dim)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scaling)
        return attended.reshape(rows, heads, dim)

    def _prefill(
        self, chunk: Chunk, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """[tokens, heads, dim]."""
        if chunk.pieces is None:
            keys, values = new[:, None, :, chunk.first : chunk.last]
        else:
            keys, values = self._gather(chunk.pieces[layer], 1)[:, :, :, : chunk.length]
        if chunk.is_tiled:
            own = query[0, :, chunk.first : chunk.last]
            return tiles.attend(own, keys[0], values[0], scaling or query.shape[-1] ** -0.5)
        attended = scaled_dot_product_attention(
            query[:, :, chunk.first : chunk.last],
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return attended[0].transpose(0, 1)

    def _gather(self, pieces: torch.Tensor, rows: int) -> torch.Tensor:
        """[2, rows, kv_heads, blocks * block_size, dim]."""
        geometry = self._cache.geometry
        return self._cache.pieces.index_select(0, pieces).view(2, rows, geometry.kv_heads, -1, geometry.head_dim)

    def _write_slots(self, ragged: list[Row], positions: Ids) -> torch.Tensor:
        """[layers, 2 * kv_heads * total]: where in `KVCache.slots` each new key and value goes."""
        geometry = self._cache.geometry
        blocks = np.array([row.table[place] for row in ragged for place in self._blocks_written(row)])
        first = blocks * geometry.rows_per_block * self._size + positions % self._size
        rows = np.arange(geometry.rows_per_block).reshape(geometry.layers, -1, 1) * self._size
        return self._tensor((rows + first).reshape(geometry.layers, -1))

    def _decode_groups(self, ragged: list[Row]) -> list[DecodeGroup]:
        """Rows come longest first; a group ends where padding would be more than half."""
        grouped: list[list[Row]] = []
        for row in ragged:
            if grouped and 2 * (row.start + 1) >= grouped[-1][0].start + 1:
                grouped[-1].append(row)
            else:
                grouped.append([row])
        dense = self._memory.groups_for(grouped) if self._memory is not None else [None] * len(grouped)
        ends = np.cumsum([len(rows) for rows in grouped]).tolist()
        return [
            self._decode_group(rows, end - len(rows), copies)
            for rows, end, copies in zip(grouped, ends, dense, strict=True)
        ]

    def _decode_group(self, rows: list[Row], first: int, dense: DenseGroup | None) -> DecodeGroup:
        length = rows[0].start + 1
        if dense is not None:
            return DecodeGroup(first, first + len(rows), length, None, dense, None)
        mask = None
        if rows[-1].start + 1 < length:
            lengths = np.array([row.start + 1 for row in rows])
            mask = self._tensor(np.arange(length) < lengths[:, None])[:, None, None]
        return DecodeGroup(first, first + len(rows), length, mask, None, self._padded_pieces(rows))

    def _padded_pieces(self, rows: list[Row]) -> torch.Tensor:
        tables = np.empty((len(rows), self._blocks_of(rows[0])), dtype=np.int64)
        for table, row in zip(tables, rows, strict=True):
            own = self._blocks_of(row)
            table[:own] = row.table[:own]
            table[own:] = row.table[0]  # what is masked out is the sequence's own
        return self._pieces(tables)

    def _chunk(self, row: Row, last: int) -> Chunk:
        count = len(row.token_ids)
        length = row.start + count
        is_tiled = tiles.can_tile(self._cache.device, self._cache.geometry.dtype, count, length)
        if row.start == 0:
            return Chunk(last - count, last, None, None, length, is_tiled)
        table = np.frombuffer(row.table, dtype=np.int64)[: -(-length // self._size)]
        mask = None if is_tiled else self._tensor(np.arange(length) <= np.arange(row.start, length)[:, None])
        return Chunk(last - count, last, self._pieces(table[None]), mask, length, is_tiled)

    def _pieces(self, tables: Ids) -> torch.Tensor:
        """Tables [rows, blocks] -> [layers, 2 * rows * kv_heads * blocks] rows of `KVCache.pieces`."""
        geometry = self._cache.geometry
        within = np.arange(geometry.rows_per_block).reshape(geometry.layers, 2, 1, geometry.kv_heads, 1)
        pieces = tables[:, None, :] * geometry.rows_per_block + within
        return self._tensor(pieces.reshape(geometry.layers, -1))

    def _blocks_written(self, row: Row) -> list[int]:
        """For each token of the row the place of its block in the table."""
        if len(row.token_ids) == 1:
            return [row.start // self._size]
        return [position // self._size for position in range(row.start, row.start + len(row.token_ids))]

    def _blocks_of(self, row: Row) -> int:
        return row.start // self._size + 1

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).to(self._cache.device, non_blocking=True)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of `transformers.AttentionInterface`. The mask is not used: the step knows who sees what."""
    for name in UNIMPLEMENTED:
        if kwargs.get(name) is not None:
            raise Unservable(
                f"{type(module).__name__} asks for {name} in its attention, which the torch engine does not have"
            )
    step: PagedStep | RaggedStep = kwargs[STEP_ARGUMENT]
    layer: Any = module.layer_idx
    return step.attend(layer, query, key, value, scaling), None
