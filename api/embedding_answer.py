"""The answer to one request for embeddings: the tasks that it became, read to their ends, and their vectors in the order of the inputs.

1. Submit all tasks. Where one is refused, those before it are cancelled and the refusal is the answer.
2. Wait for their ends, for the client to leave, or for the server to have to. The first task that fails decides.
3. Settle: a task that has not ended is left as a generation is, whatever the reason was.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

import anyio
import msgspec
import numpy as np
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answers import ClientGone, has_come, leave
from api.edge import REQUEST_ID
from api.errors import error_of_end
from api.service import ServedPool, Service
from pipeline.embeddings import vectors_of
from pipeline.errors import BatonError, Draining, RequestFailed
from pipeline.protocol import Request
from pipeline.stream import RequestStream

INLINE_BYTES = 262_144  # of vectors; more are written in a thread, so that they do not hold up the streams

log = structlog.get_logger("baton.api")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One task: its request, how many inputs it has, and what submits it."""

    request: Request
    count: int
    opening: Callable[[], Awaitable[RequestStream]]


class EmbeddingAnswer(Response):
    """See the module's docstring."""

    def __init__(self, service: Service, pool: ServedPool, parts: Sequence[Part], *, as_base64: bool) -> None:
        super().__init__()
        self._service = service
        self._pool = pool
        self._parts = parts
        self._as_base64 = as_base64
        self._streams: list[RequestStream] = []
        self._begin_s = time.monotonic()
        self._why = ""  # why tasks were left before they ended
        self._is_interrupted = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request to its end."""
        live = self._service.metrics.live.labels(self._pool.name)
        live.inc()
        work = asyncio.create_task(self._answer(scope), name="embeddings")
        try:
            with self._service.drain.interrupting(lambda: self._interrupt(work)):
                await has_come(work, receive, None)
            response = Response(self._outcome(work), media_type="application/json")
        except ClientGone:
            self._why = "client disconnected"
            return
        except asyncio.CancelledError:
            self._why = self._why or "server stopped"
            raise
        except BatonError as error:
            self._why = error.code
            raise
        finally:
            live.dec()
            with anyio.CancelScope(shield=True):
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await asyncio.gather(*(self._settle(stream) for stream in self._streams))
        await response(scope, receive, send)

    def _interrupt(self, work: asyncio.Task[bytes]) -> None:
        self._is_interrupted = True
        work.cancel()

    def _outcome(self, work: asyncio.Task[bytes]) -> bytes:
        if self._is_interrupted and work.cancelled():
            raise Draining(
                "the server shut down before the answer was complete: send the request again", retry_after_s=1.0
            )
        return work.result()

    async def _answer(self, scope: Scope) -> bytes:
        for part in self._parts:
            self._streams.append(await part.opening())
        scope[REQUEST_ID] = self._streams[0].id
        try:
            async with asyncio.TaskGroup() as group:
                for stream in self._streams:
                    group.create_task(_ended(stream))
        except ExceptionGroup as errors:  # the first one is the reason, the others were cancelled for it
            raise errors.exceptions[0] from None
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
        to_json, encode = as_base64 if self._as_base64 else as_floats, msgspec.json.Encoder().encode

        def write() -> bytes:
            data = [  # one at a time: the interpreter's lock is held for as long as one call encodes
                msgspec.Raw(encode({"object": "embedding", "index": index, "embedding": to_json(vector)}))
                for index, vector in enumerate(vectors)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return encode({"object": "list", "data": data, "model": self._pool.name, "usage": usage})

        return write

    async def _settle(self, stream: RequestStream) -> None:
        """Leave nothing behind: not the reading, not a task that nobody wants."""
        ended, request = stream.ended, stream.request
        assert request is not None
        if ended is None:
            self._why = self._why or "another task of the same answer failed"
            await leave(self._pool, stream, self._why)
        async with stream:
            pass  # forgotten here
        state, seconds = ended.state if ended is not None else "left", time.monotonic() - self._begin_s
        if stream.is_creator:
            self._service.metrics.ended(self._pool.name, request.kind, state, seconds, ended)
        log.info(
            "request ended" if stream.is_creator else "reader of a request ended",
            request_id=request.id,
            state=state,
            why=self._why or (ended.reason if ended is not None else ""),
            prompt_tokens=len(request.input.token_ids),
            total_ms=round(seconds * 1000, 1),
        )


async def _ended(stream: RequestStream) -> None:
    """Returns when it is done. Raises what became of it otherwise."""
    async with contextlib.aclosing(aiter(stream)) as items:  # type: ignore[type-var]
        async for _ in items:
            pass  # it has no tokens
    if stream.ended is None:
        raise RequestFailed("the task ended without an end of its request")
    if stream.ended.state != "done":
        raise error_of_end(stream.ended)


def as_floats(vector: bytes) -> list[float]:
    """The numbers of little-endian float32."""
    numbers: list[float] = np.frombuffer(vector, dtype="<f4").tolist()
    return numbers


def as_base64(vector: bytes) -> str:
    """The same bytes, as OpenAI's clients ask for them."""
    return base64.b64encode(vector).decode()
