"""The kernel that gathers blocks into a run of bytes, or scatters them: one launch for all layers. Triton comes with PyTorch for GPUs.

A launch for each layer would be as fast on the GPU. But each launch takes Python's lock, which the thread that steps the model holds
most of the time: with 64 launches a hand-over took 19 to 60 ms under load where one of them takes 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROGRAMS = 96  # of the 132 multiprocessors of an H100: a copy must not keep the model from computing
WORDS = 2048  # of 8 bytes, that a program moves at once


@triton.jit(do_not_specialize=["num_blocks", "skip", "first_row", "last_row"])  # type: ignore[untyped-decorator]
def move_rows(  # type: ignore[no-untyped-def]
    table, index, run, num_blocks, skip, first_row, last_row, is_scatter: tl.constexpr, words_at_once: tl.constexpr
):
    """Rows `first_row` to `last_row` of all layers' blocks but the first `skip`, counted layer after layer.

    table: [layers, 4] of int64: address, words from block to block, words of a block, words of a block in all layers before;
    index: [num_blocks] of int64, the blocks; run: address of the run's first word, also where only a part of it is there.
    """
    of_a_layer = num_blocks - skip
    run_words = run.to(tl.pointer_type(tl.int64))
    for row in range(first_row + tl.program_id(0), last_row, tl.num_programs(0)):
        entry = table + (row // of_a_layer) * 4
        number = skip + row % of_a_layer
        words = tl.load(entry + 2)
        paged = tl.load(entry).to(tl.pointer_type(tl.int64)) + tl.load(index + number) * tl.load(entry + 1)
        flat = run_words + tl.load(entry + 3) * num_blocks + number * words
        for at in range(0, words, words_at_once):
            offsets = at + tl.arange(0, words_at_once)
            is_inside = offsets < words
            if is_scatter:
                tl.store(paged + offsets, tl.load(flat + offsets, is_inside), is_inside)
            else:
                tl.store(flat + offsets, tl.load(paged + offsets, is_inside), is_inside)
