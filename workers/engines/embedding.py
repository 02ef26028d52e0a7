"""The embedding engine over an `Embedder`: sequences of all requests in batches that are bounded by tokens.

Requests are worked on in the order in which they came, their sequences in theirs; a batch takes as many as fit it, from several requests
where one does not fill it. A sequence that is longer than a batch is one of its own: without keys and values there are no chunks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineError
from pipeline.kv_events import KVEvent
from pipeline.protocol import LLMEngineOutput
from workers.engine import EngineInfo, EngineStats
from workers.engines.step_times import StepTimes

Vectors = NDArray[np.float32]

TINY = 1e-12  # the norm of a vector without length, as PyTorch's `normalize` has it


class Embedder(Protocol):
    """Computes one batch at a time."""

    @property
    def is_normalized(self) -> bool:
        """Whether vectors have length 1. Known after `start`."""
        ...

    async def start(self) -> EngineInfo:
        """Load the model. Raises `Unservable`."""
        ...

    async def vectors(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """[sequences, width], not normalized."""
        ...

    async def close(self) -> None:
        """Give everything back, once what runs is over."""
        ...


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """The sequences of one request; `begun`: how many of them were put into a batch."""

    request_id: str
    sequences: list[list[int]]
    answer: asyncio.Future[list[Vectors]]
    begun: int = 0
    rows: list[Vectors] = dataclasses.field(default_factory=list)


class BatchedEmbedding:
    """An `EmbeddingEngine`; see the module's docstring."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._calls: list[Call] = []  # those without an answer, in the order in which they came
        self._has_work = asyncio.Event()
        self._tokens = 0
        self._times = StepTimes()
        self._loop: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        """See `BaseEngine.info`."""
        return self._info

    async def start(self) -> None:
        """See `BaseEngine.start`."""
        self._info = await self._embedder.start()
        self._loop = asyncio.create_task(self._work(), name="embedding batches")

    async def embed(self, request_id: str, sequences: list[list[int]], dimensions: int | None) -> list[bytes]:
        """See `EmbeddingEngine.embed`."""
        call = Call(request_id, sequences, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        self._has_work.set()
        try:
            rows = await call.answer
        finally:
            self._calls.remove(call)
        return [packed(row, dimensions, is_normalized=self._embedder.is_normalized) for row in rows]

    async def steps(self) -> AsyncIterator[list[LLMEngineOutput]]:
        """See `BaseEngine.steps`: there are none, but where batches cannot go on, it raises why."""
        assert self._loop is not None
        await asyncio.wait([self._loop])
        if not self._loop.cancelled():
            self._loop.result()
        return
        yield []  # what makes this an iterator

    async def kv_events(self) -> AsyncIterator[list[KVEvent]]:
        """See `BaseEngine.kv_events`: no keys and values are kept."""
        return
        yield []  # what makes this an iterator

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `BaseEngine.cancel`. A batch that runs is not stopped."""
        for call in self._calls:
            if call.request_id == request_id:
                call.answer.cancel()

    async def release(self, handle_id: str) -> None:
        """See `BaseEngine.release`: nothing is ever exported."""

    def stats(self) -> EngineStats:
        """See `BaseEngine.stats`."""
        waiting = sum(len(call.sequences) - call.begun for call in self._calls)
        running = sum(call.begun - len(call.rows) for call in self._calls)
        return EngineStats(
            running=running,
            waiting=waiting,
            prompt_tokens_computed=self._tokens,
            steps=self._times.steps,
            busy_s=self._times.busy_s,
            step_ms=self._times.average_ms,
        )

    async def close(self) -> None:
        """See `BaseEngine.close`."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        if not self._is_closed:
            self._is_closed = True
            await self._embedder.close()

    async def _work(self) -> None:
        while True:
            self._has_work.clear()
            while batch := next_batch(self._calls, self._info.max_num_batched_tokens):
                await self._compute(batch)
            await self._has_work.wait()

    async def _compute(self, batch: Sequence[tuple[Call, list[int]]]) -> None:
        started_s = time.monotonic()
        try:
            rows = await self._embedder.vectors([sequence for _, sequence in batch])
        except Exception as error:  # noqa: BLE001  # of these requests: others may be computed all the same
            for call, _ in batch:
                if not call.answer.done():
                    call.answer.set_exception(EngineError(f"a batch failed: {type(error).__name__}: {error}"))
            return
        for (call, _), row in zip(batch, rows, strict=True):
            call.rows.append(row)
            if len(call.rows) == len(call.sequences) and not call.answer.done():
                call.answer.set_result(call.rows)
        self._tokens += sum(len(sequence) for _, sequence in batch)
        self._times.add(time.monotonic() - started_s)


def next_batch(calls: Iterable[Call], max_tokens: int) -> list[tuple[Call, list[int]]]:
    """Take the next sequences, at least one where there is any, and no more than `max_tokens` unless that one is longer."""
    batch: list[tuple[Call, list[int]]] = []
    tokens = 0
    for call in calls:
        while call.begun < len(call.sequences) and not call.answer.done():
            sequence = call.sequences[call.begun]
            if batch and tokens + len(sequence) > max_tokens:
                return batch
            batch.append((call, sequence))
            tokens += len(sequence)
            call.begun += 1
    return batch


def packed(row: Vectors, dimensions: int | None, *, is_normalized: bool) -> bytes:
    """A vector as it travels: little-endian float32, its first `dimensions` numbers alone where that is asked for.

    A vector that was cut has length 1 again, as a matryoshka model was trained to be used.
    """
    kept = row[:dimensions]
    if is_normalized or len(kept) < len(row):
        kept = kept / max(float(np.linalg.norm(kept)), TINY)
    return kept.astype("<f4").tobytes()
