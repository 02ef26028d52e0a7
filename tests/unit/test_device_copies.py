"""How blocks of layers are cut into pieces that fit staging memory."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from workers.engines.device_copies import Piece, batches_of, joined


@pytest.mark.parametrize("skip", [0, 1, 4, 5])
@pytest.mark.parametrize("limit", [1, 64, 100, 640, 10_000])
@pytest.mark.parametrize("rows", [[64], [64, 64, 64], [8, 64, 16]])
def test_every_byte_but_the_skipped_ones_once(rows: list[int], limit: int, skip: int) -> None:
    batches = batches_of(rows, 5, skip, limit)
    seen = sorted((piece.offset, piece.offset + piece.nbytes) for batch in batches for piece in batch)
    wanted, base = [], 0
    for row in rows:
        wanted += [(base + n * row, base + (n + 1) * row) for n in range(skip, 5)]
        base += 5 * row
    assert [n for span in seen for n in range(*span)] == [n for span in wanted for n in range(*span)]
    for batch in batches:
        assert sum(piece.nbytes for piece in batch) <= limit or len(batch) == batch[0].count == 1
        assert all(piece.nbytes == piece.count * rows[piece.layer] for piece in batch)


def test_whole_layers_leave_in_one_copy() -> None:
    [batch] = batches_of([64, 64], 5, 0, 1000)
    assert list(joined(batch)) == [(0, 0, 640)]


def test_layers_without_their_first_blocks_are_a_copy_each() -> None:
    [batch] = batches_of([64, 64], 5, 2, 1000)
    assert batch == [Piece(0, 2, 3, 128, 192), Piece(1, 2, 3, 320 + 128, 192)]
    assert list(joined(batch)) == [(0, 128, 192), (192, 448, 192)]
