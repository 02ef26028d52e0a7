"""How blocks of layers are cut into pieces that fit staging memory, and what the kernel does, by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

pytest.importorskip("torch")

from workers.engines.device_copies import Piece, batches_of, joined

ROWS = ([64], [64, 64, 64], [8, 64, 16])


@pytest.mark.parametrize("skip", [0, 1, 4, 5])
@pytest.mark.parametrize("limit", [1, 64, 100, 640, 10_000])
@pytest.mark.parametrize("rows", ROWS)
def test_every_byte_but_the_skipped_ones_once(rows: list[int], limit: int, skip: int) -> None:
    pieces = [piece for batch in batches_of(rows, 5, skip, limit) for piece in batch]
    seen = [n for piece in pieces for n in range(piece.offset, piece.offset + piece.nbytes)]
    bases = accumulate((5 * row for row in rows), initial=0)
    layers = zip(bases, rows, strict=False)
    assert seen == [n for base, row in layers for n in range(base + skip * row, base + 5 * row)]
    numbers = [n for piece in pieces for n in range(piece.first_row, piece.first_row + piece.count)]
    assert numbers == list(range(len(rows) * (5 - skip)))


@pytest.mark.parametrize("skip", [0, 1, 4])
@pytest.mark.parametrize("limit", [1, 64, 100, 640])
@pytest.mark.parametrize("rows", ROWS)
def test_a_batch_fits_or_is_one_block(rows: list[int], limit: int, skip: int) -> None:
    for batch in batches_of(rows, 5, skip, limit):
        span = batch[-1].offset + batch[-1].nbytes - batch[0].offset
        assert span <= limit or len(batch) == batch[0].count == 1


def test_whole_layers_leave_in_one_copy() -> None:
    [batch] = batches_of([64, 64], 5, 0, 1000)
    assert list(joined(batch)) == [(0, 640)]


def test_layers_without_their_first_blocks_are_a_copy_each() -> None:
    [batch] = batches_of([64, 64], 5, 2, 1000)
    assert batch == [Piece(0, 3, 128, 192), Piece(3, 3, 320 + 128, 192)]
    assert list(joined(batch)) == [(128, 192), (448, 192)]


KERNEL = """
import torch
from workers.engines.block_kernel import move_rows
from workers.engines.device_copies import batches_of, table_of

generator = torch.Generator().manual_seed(1)
for rows in [64], [64, 128, 72]:
    memory = [torch.randint(0, 256, (9, 2 * row), dtype=torch.uint8, generator=generator) for row in rows]
    layers = [kept[:, :row] for kept, row in zip(memory, rows)]  # blocks that do not lie one behind the other
    blocks, skip = [7, 2, 5, 0], 1
    table, index = torch.tensor(table_of(layers)), torch.tensor(blocks)
    run = torch.zeros(len(blocks) * sum(rows), dtype=torch.uint8)
    for batch in batches_of(rows, len(blocks), 0, 200):
        move_rows[(3,)](table, index, run.data_ptr(), len(blocks), 0, batch[0].first_row,
                        batch[-1].first_row + batch[-1].count, False, 16)
    assert torch.equal(run, torch.cat([layer[blocks].reshape(-1) for layer in layers])), rows
    wanted = torch.randint(0, 256, run.shape, dtype=torch.uint8, generator=generator)
    before = [layer.clone() for layer in layers]
    for batch in batches_of(rows, len(blocks), skip, 200):
        move_rows[(3,)](table, index, wanted.data_ptr(), len(blocks), skip, batch[0].first_row,
                        batch[-1].first_row + batch[-1].count, True, 16)
    at = 0
    for layer, old, row in zip(layers, before, rows):
        old[blocks[skip:]] = wanted[at + skip * row : at + len(blocks) * row].view(-1, row)
        assert torch.equal(layer, old), rows
        at += len(blocks) * row
"""


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="PyTorch brings Triton for GPUs only")
def test_the_kernel_gathers_and_scatters() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", KERNEL]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
