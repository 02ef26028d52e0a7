"""Blocks of a GPU into one run of bytes and back.

A block of a layer is small, and a copy costs by the piece: of one GiB in pieces of 256 KiB a bus that moves 280 GB/s makes 27. So
blocks are gathered on the GPU into staging memory and leave it in one piece, and come in the other way. Two lanes, each a stream with its
own staging memory, take turns: while one gathers the other copies.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from workers import cuda
from workers.transfer import DeviceBytes, Memory

STAGING_BYTES = 33_554_432
WIDE = (torch.int64, torch.int32, torch.int16, torch.uint8)  # what rows are copied as: the widest that divides them


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` blocks of a layer, from the `first` of the table on; they stand at `offset` in the run of bytes."""

    layer: int
    first: int
    count: int
    offset: int
    nbytes: int


def batches_of(rows: Sequence[int], num_blocks: int, skip: int, limit: int) -> list[list[Piece]]:
    """A run of `[layers, blocks, bytes of a block in that layer (`rows`)]` without each layer's first `skip` blocks, in batches of at most
    `limit` bytes, or one block."""
    batches: list[list[Piece]] = []
    room = base = 0
    for layer, row in enumerate(rows):
        most = max(1, limit // row)
        for first in range(skip, num_blocks, most):
            count = min(most, num_blocks - first)
            if count * row > room:
                batches.append([])
                room = limit
            batches[-1].append(Piece(layer, first, count, base + first * row, count * row))
            room -= count * row
        base += num_blocks * row
    return batches


def joined(batch: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """Where a batch lies in staging memory and in the run, and how many bytes: neighbours in both are one copy."""
    at = start = 0
    first = batch[0]
    expected = first.offset
    for piece in batch:
        if piece.offset != expected:
            yield start, first.offset, at - start
            start, first = at, piece
        at += piece.nbytes
        expected = piece.offset + piece.nbytes
    yield start, first.offset, at - start


class Lane:
    """A stream with staging memory of its own."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.staging = torch.empty(nbytes, dtype=torch.uint8, device=device)


class DeviceCopies:
    """Copies blocks of `layers`, each `[blocks, bytes of a block]` of uint8 on one GPU. Called from any thread; one copy at a time."""

    def __init__(self, layers: Sequence[torch.Tensor], staging_bytes: int = STAGING_BYTES) -> None:
        self._rows = [layer.shape[1] for layer in layers]
        self._dtype = next(wide for wide in WIDE if all(row % wide.itemsize == 0 for row in self._rows))
        self._layers = [layer.view(self._dtype) for layer in layers]
        self._limit = max(staging_bytes, *self._rows)
        self.device = layers[0].device
        self._lanes = [Lane(self.device, self._limit) for _ in range(2)]
        self._lock = threading.Lock()

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """Copy these blocks into `out`, layer after layer. Returns when it is done."""
        with self._turn(), torch.no_grad():
            index = torch.tensor(blocks, device=self.device)
            if isinstance(out, DeviceBytes) and out.device == self.device.index:
                self._gather_here(index, cuda.as_tensor(out.device, out.address, out.nbytes))
            else:
                self._gather_away(index, out.address if isinstance(out, DeviceBytes) else cuda.address_of(out))

    def scatter(
        self, data: Memory, blocks: Sequence[int], skip: int = 0, after: torch.cuda.Event | None = None
    ) -> None:
        """Copy `data`, a run of all these blocks, into them, but for the first `skip`. Returns when it is done.

        `after`: what has to be over before the blocks are written.
        """
        source = data.address if isinstance(data, DeviceBytes) else cuda.address_of(data)
        with self._turn(), torch.no_grad():
            index = torch.tensor(blocks, device=self.device)
            if after is not None:
                for lane in self._lanes:
                    lane.stream.wait_event(after)
            for lane, batch in self._batches(len(blocks), skip):
                for start, offset, nbytes in joined(batch):
                    cuda.copy(lane.staging.data_ptr() + start, source + offset, nbytes, lane.stream)
                with torch.cuda.stream(lane.stream):
                    for piece, rows in self._views(lane.staging, batch):
                        self._layers[piece.layer].index_copy_(0, index[piece.first : piece.first + piece.count], rows)

    def _gather_here(self, index: torch.Tensor, out: torch.Tensor) -> None:
        """Into memory of this device, without staging."""
        stream = self._lanes[0].stream
        [batch] = batches_of(self._rows, len(index), 0, out.numel())
        with torch.cuda.stream(stream):
            for piece, rows in self._views(out, batch):
                torch.index_select(self._layers[piece.layer], 0, index, out=rows)

    def _gather_away(self, index: torch.Tensor, out: int) -> None:
        for lane, batch in self._batches(len(index), 0):
            with torch.cuda.stream(lane.stream):
                for piece, rows in self._views(lane.staging, batch):
                    selected = index[piece.first : piece.first + piece.count]
                    torch.index_select(self._layers[piece.layer], 0, selected, out=rows)
            for start, offset, nbytes in joined(batch):
                cuda.copy(out + offset, lane.staging.data_ptr() + start, nbytes, lane.stream)

    def _batches(self, num_blocks: int, skip: int) -> Iterator[tuple[Lane, list[Piece]]]:
        return zip(itertools.cycle(self._lanes), batches_of(self._rows, num_blocks, skip, self._limit), strict=False)

    def _views(self, memory: torch.Tensor, batch: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece of a batch as rows of `memory`, in which they lie one behind the other."""
        at = 0
        for piece in batch:
            yield piece, memory[at : at + piece.nbytes].view(self._dtype).view(piece.count, -1)
            at += piece.nbytes

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One copy at a time; none runs any more when it is left, however that is."""
        with self._lock, torch.cuda.device(self.device):
            try:
                yield
            finally:
                for lane in self._lanes:
                    lane.stream.synchronize()
