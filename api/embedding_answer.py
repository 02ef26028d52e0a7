"""The answer to one request for embeddings: the tasks that it became, and their vectors in the order of the inputs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

from api.answers import Opening
from api.service import Service
from api.several import SeveralAnswer
from pipeline.embeddings import vectors_of
from pipeline.errors import RequestFailed
from pipeline.pools import ServedPool
from pipeline.protocol import Request
from pipeline.stream import RequestStream
from pipeline.surface.embedding_answers import embeddings_body
from pipeline.surface.errors import check_end

INLINE_BYTES = 262_144  # of vectors; more are written in a thread, so that they do not hold up the streams


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One task: its request, how many inputs it has, and what submits it."""

    request: Request
    count: int
    opening: Opening


class EmbeddingAnswer(SeveralAnswer):
    """One list of vectors."""

    def __init__(self, service: Service, pool: ServedPool, parts: Sequence[Part], *, as_base64: bool) -> None:
        super().__init__(service, pool, [part.opening for part in parts])
        self._parts = parts
        self._as_base64 = as_base64

    async def _read(self, number: int, stream: RequestStream) -> None:
        await _ended(stream)

    async def _body(self) -> bytes:
        vectors = await self._vectors()
        write = self._body_of(vectors)
        return write() if sum(map(len, vectors)) <= INLINE_BYTES else await asyncio.to_thread(write)

    async def _vectors(self) -> list[bytes]:
        ids = [stream.id for stream in self._streams]
        vectors: list[bytes] = []
        for part, request_id, brief in zip(
            self._parts, ids, await self._pool.client.queue.standing(ids, with_results=True), strict=True
        ):
            if brief is None:
                raise RequestFailed(f"{request_id}: Redis lost its result: send the request again")
            vectors += vectors_of(request_id, brief.result, part.count)
        return vectors

    def _body_of(self, vectors: list[bytes]) -> Callable[[], bytes]:
        tokens = sum(len(part.request.input.token_ids) for part in self._parts)
        return functools.partial(embeddings_body, self._pool.name, vectors, tokens, as_base64=self._as_base64)


async def _ended(stream: RequestStream) -> None:
    """Returns when it is done. Raises what became of it otherwise."""
    async with contextlib.aclosing(aiter(stream)) as items:  # type: ignore[type-var]
        async for _ in items:
            pass  # it has no tokens
    if stream.ended is None:
        raise RequestFailed("the task ended without an end of its request")
    check_end(stream.ended, is_complete=True)
