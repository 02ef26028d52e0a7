"""Blocks of a GPU into one run of bytes and back.

A block of a layer is small, and a copy costs by the piece: of one GiB in pieces of 256 KiB a bus that moves 280 GB/s makes 27. So
blocks are gathered on the GPU and leave it in one piece, and come in the other way. Where the run is memory that the GPU reaches, its own
or another GPU's, one kernel does all of it. To and from host memory they pass through staging memory, in two lanes that take turns: while
one gathers the other copies.
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
WORD = 8  # bytes that are moved as one


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` blocks of a layer; they stand at `offset` in the run of bytes. `first_row`: blocks of all layers before them."""

    first_row: int
    count: int
    offset: int
    nbytes: int


def batches_of(rows: Sequence[int], num_blocks: int, skip: int, limit: int) -> list[list[Piece]]:
    """A run of `[layers, blocks, bytes of a block in that layer (`rows`)]` without each layer's first `skip` blocks, in batches that
    span at most `limit` bytes of the run, or one block."""
    batches: list[list[Piece]] = []
    base = begin = 0
    for layer, row in enumerate(rows):
        most = max(1, limit // row)
        for first in range(skip, num_blocks, most):
            count = min(most, num_blocks - first)
            piece = Piece(layer * (num_blocks - skip) + first - skip, count, base + first * row, count * row)
            if not batches or piece.offset + piece.nbytes - begin > limit:
                batches.append([])
                begin = piece.offset
            batches[-1].append(piece)
        base += num_blocks * row
    return batches


def joined(batch: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Where in the run a batch lies, and how many bytes: neighbours are one copy."""
    start, end = batch[0].offset, batch[0].offset
    for piece in batch:
        if piece.offset != end:
            yield start, end - start
            start = piece.offset
        end = piece.offset + piece.nbytes
    yield start, end - start


class Lane:
    """A stream with staging memory of its own."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.staging = torch.empty(nbytes, dtype=torch.uint8, device=device)


class DeviceCopies:
    """Copies blocks of `layers`, each `[blocks, bytes of a block]` of uint8 on one GPU. Called from any thread; one copy at a time."""

    def __init__(self, layers: Sequence[torch.Tensor], staging_bytes: int = STAGING_BYTES) -> None:
        self._layers = layers  # keeps their memory
        self._rows = [layer.shape[1] for layer in layers]
        self.device = layers[0].device
        self._table = torch.tensor(table_of(layers), device=self.device)
        self._limit = max(staging_bytes, *self._rows)
        self._lanes = [Lane(self.device, self._limit) for _ in range(2)]
        self._lock = threading.Lock()
        self._warm_up()

    def gather(self, blocks: Sequence[int], out: Memory, after: torch.cuda.Event | None = None) -> None:
        """Copy these blocks into `out`, layer after layer. Returns when it is done. `after`: what has to be over before they are read."""
        with self._turn(after):
            index = self._index(blocks)
            if isinstance(out, DeviceBytes):
                self._move(self._lanes[0].stream, index, out.address, 0, self._whole(index, 0), is_scatter=False)
                return
            run = cuda.address_of(out)
            for lane, batch in self._batches(index, 0):
                begin = batch[0].offset
                self._move(lane.stream, index, lane.staging.data_ptr() - begin, 0, batch, is_scatter=False)
                for offset, nbytes in joined(batch):
                    cuda.copy(run + offset, lane.staging.data_ptr() + offset - begin, nbytes, lane.stream)

    def scatter(
        self, data: Memory, blocks: Sequence[int], skip: int = 0, after: torch.cuda.Event | None = None
    ) -> None:
        """Copy `data`, a run of all these blocks, into them, but for the first `skip`. Returns when it is done.

        `after`: what has to be over before the blocks are written.
        """
        with self._turn(after):
            index = self._index(blocks)
            if isinstance(data, DeviceBytes):
                whole = self._whole(index, skip)
                self._move(self._lanes[0].stream, index, data.address, skip, whole, is_scatter=True)
                return
            run = cuda.address_of(data)
            for lane, batch in self._batches(index, skip):
                begin = batch[0].offset
                for offset, nbytes in joined(batch):
                    cuda.copy(lane.staging.data_ptr() + offset - begin, run + offset, nbytes, lane.stream)
                self._move(lane.stream, index, lane.staging.data_ptr() - begin, skip, batch, is_scatter=True)

    def _move(
        self, stream: torch.cuda.Stream, index: torch.Tensor, run: int, skip: int, batch: Sequence[Piece], *, is_scatter: bool
    ) -> None:  # fmt: skip
        """One launch."""
        from workers.engines.block_kernel import PROGRAMS, WORDS, move_rows

        if not batch:
            return
        first_row = batch[0].first_row
        last_row = batch[-1].first_row + batch[-1].count
        with torch.cuda.stream(stream):
            move_rows[(min(PROGRAMS, last_row - first_row),)](
                self._table, index, run, len(index), skip, first_row, last_row, is_scatter, WORDS, num_warps=8
            )

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        """The blocks' numbers on the GPU. A thread's own stream is the model's, too: by that one it would wait for a running step."""
        with torch.cuda.stream(self._lanes[0].stream):
            return torch.tensor(blocks, device=self.device)

    def _whole(self, index: torch.Tensor, skip: int) -> list[Piece]:
        """All of it in one batch."""
        batches = batches_of(self._rows, len(index), skip, len(index) * sum(self._rows))
        return [piece for batch in batches for piece in batch]

    def _batches(self, index: torch.Tensor, skip: int) -> Iterator[tuple[Lane, list[Piece]]]:
        return zip(itertools.cycle(self._lanes), batches_of(self._rows, len(index), skip, self._limit), strict=False)

    def _warm_up(self) -> None:
        """Have the kernel compiled, both ways, before a request waits for it."""
        nbytes = sum(self._rows)
        kept = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        here = DeviceBytes(self.device.index, kept.data_ptr(), nbytes)
        self.gather([0], here)
        self.scatter(here, [0])

    @contextlib.contextmanager
    def _turn(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """One copy at a time, behind `after`; none runs any more when it is left, however that is."""
        with self._lock, torch.cuda.device(self.device):
            try:
                for lane in self._lanes if after is not None else ():
                    lane.stream.wait_event(after)  # type: ignore[arg-type]
                yield
            finally:
                for lane in self._lanes:
                    lane.stream.synchronize()


def table_of(layers: Sequence[torch.Tensor]) -> list[list[int]]:
    """What `block_kernel.move_rows` has to know of `layers`, each `[blocks, bytes of a block]`. Raises `ValueError` for odd sizes."""
    table, before = [], 0
    for layer in layers:
        row, stride = layer.shape[1], layer.stride(0)
        if row % WORD or stride % WORD or layer.data_ptr() % WORD:
            raise ValueError(f"blocks of {row} bytes, {stride} bytes apart, are no multiples of {WORD} bytes")
        table.append([layer.data_ptr(), stride // WORD, row // WORD, before // WORD])
        before += row
    return table
