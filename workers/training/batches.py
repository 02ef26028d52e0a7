"""Training rows made by worker processes: token ids and, for each token, how much the model is trained to produce it."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import queue
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from workers.training.corpus import SIZES, Corpus, Sample, Size, segments
from workers.training.tokenizer import PAD_ID

CHUNK_TOKENS = 2**18
FULL_WEIGHT = 255

# How often a worker starts on a row of each size; the sizes differ in length by 20, so the shares in tokens are nearly equal.
_TURN: tuple[Size, ...] = ("short",) * 24 + ("medium",) * 7 + ("long",) * 2 + ("longer",) + ("longest",)


class Chunk(NamedTuple):
    """Rows of one size: `ids` int16 of shape (rows, length), padded; `weights` uint8 of the same shape, 0 to FULL_WEIGHT."""

    size: Size
    ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.uint8]


class Feeder:
    """Worker processes that make chunks until `close`. Each has its own seed below 2**32, the range that training draws from."""

    def __init__(self, tokenizer_json: str, seed: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._chunks: multiprocessing.Queue[Chunk] = context.Queue(maxsize=32)
        self._processes: list[BaseProcess] = [
            context.Process(
                target=_make_chunks, args=(tokenizer_json, (seed * 1000 + number) % 2**32, self._chunks), daemon=True
            )
            for number in range(processes)
        ]
        for process in self._processes:
            process.start()

    def wait(self, seconds: float) -> Chunk:
        """The next chunk. Raises queue.Empty when none comes in time."""
        return self._chunks.get(timeout=seconds)

    def ready(self, limit: int) -> Iterator[Chunk]:
        """Up to `limit` chunks that are there already."""
        for _ in range(limit):
            try:
                yield self._chunks.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def row(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of `sample` and their weights. A long answer weighs less a token, so that stories do not drown sums."""
    pieces = segments(sample)
    ids: list[int] = []
    weights: list[int] = []
    for piece, encoding in zip(
        pieces, tokenizer.encode_batch([p.text for p in pieces], add_special_tokens=False), strict=True
    ):
        ids += encoding.ids
        count = len(encoding.ids)
        weight = round(FULL_WEIGHT * min(1.0, max(0.2, math.sqrt(16 / count)))) if piece.answer else 0
        weights += [weight] * count
    return ids, weights


def _make_chunks(tokenizer_json: str, seed: int, chunks: multiprocessing.Queue[Chunk]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process: there are as many processes as cores
    tokenizer = Tokenizer.from_str(tokenizer_json)
    corpus = Corpus(seed)
    rows: dict[Size, list[tuple[list[int], list[int]]]] = {size: [] for size in SIZES}
    for wanted in itertools.cycle(_TURN):
        made = row(corpus.sample(wanted), tokenizer)
        size = next((size for size, length in SIZES.items() if len(made[0]) <= length), None)
        if size is None:
            continue
        rows[size].append(made)
        if len(rows[size]) * SIZES[size] >= CHUNK_TOKENS:
            chunks.put(_chunk(size, rows[size]))
            rows[size] = []


def _chunk(size: Size, rows: list[tuple[list[int], list[int]]]) -> Chunk:
    ids = np.full((len(rows), SIZES[size]), PAD_ID, dtype=np.int16)
    weights = np.zeros((len(rows), SIZES[size]), dtype=np.uint8)
    for number, (row_ids, row_weights) in enumerate(rows):
        ids[number, : len(row_ids)] = row_ids
        weights[number, : len(row_weights)] = row_weights
    return Chunk(size, ids, weights)
