"""The embed stage: vectors of token sequences. It hands over to nobody; the vectors are the request's result."""

from __future__ import annotations

from pipeline.embeddings import asked_of
from pipeline.queue import EMBED
from workers.engine import EmbeddingEngine
from workers.holdings import Task
from workers.outcome import Done, Outcome
from workers.worker import Worker


def register(worker: Worker, engine: EmbeddingEngine) -> None:
    """Make `worker` run embed tasks on `engine`."""

    @worker.task(EMBED, queue=EMBED)
    async def embed(task: Task) -> Outcome:
        asked = asked_of(task.request)
        vectors = await engine.embed(task.delivery.key, asked.sequences, asked.dimensions)
        return Done(result=b"".join(vectors))
