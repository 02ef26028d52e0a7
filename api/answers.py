"""The answer to one valid request, as a stream or as a whole. One object owns the reading of a request, from admission (or from attaching
to one that exists) to its end.

1. Open: submit or attach. What is refused here raises before any header is sent.
2. Wait for the first token (a stream: at most `headers_after_s`), for the end (a whole answer), or for the client to leave.
3. Write. From the first header on, what goes wrong is an error event and `[DONE]`, never a silent cut.
4. Settle: `RequestStream.leave` decides what becomes of a request that has not ended, whatever the reason for leaving was.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import anyio
import msgspec
import structlog
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.edge import REQUEST_ID
from api.event_stream import EventStream
from api.service import Service
from pipeline.errors import BatonError, RequestFailed
from pipeline.pools import ServedPool
from pipeline.protocol import Request
from pipeline.stream import Ended, RequestStream, TokenChunk
from pipeline.surface.collected import Collected
from pipeline.surface.errors import error_of_end
from pipeline.surface.feed import Choices, Feed
from pipeline.surface.logprobs import is_long
from pipeline.surface.transcript import Transcript

LEAVE_LIMIT_S = 5.0  # Redis may be away while a request is left; its deadline ends it then

log = structlog.get_logger("baton.api")


Opening = Callable[[], Awaitable[RequestStream]]


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Answer(Response):
    """See the module's docstring. `opening` submits or attaches; it is called here, so that nothing can happen before the settling."""

    def __init__(self, service: Service, pool: ServedPool, opening: Opening) -> None:
        super().__init__()
        self._service = service
        self._pool = pool
        self._opening = opening
        self._begin_s = time.monotonic()
        self._first_s = 0.0
        self._why = ""  # why the request was left before it ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request to its end."""
        live = self._service.metrics.live.labels(self._pool.name)
        async with await self._opening() as stream:
            feed = Feed(stream)
            scope[REQUEST_ID] = stream.id
            live.inc()
            try:
                with self._service.drain.interrupting(feed.interrupt):
                    await self._respond(feed, scope, receive, send)
            except ClientGone:
                self._why = "client disconnected"
            except SendTimeoutError:
                self._why = f"client did not read for {self._service.settings.send_timeout_s:g} s"
            except BatonError as error:
                self._why = error.code
                raise
            except asyncio.CancelledError:
                self._why = "server stopped"
                raise
            except Exception:
                self._why = "internal error"
                raise
            finally:
                live.dec()
                await self._settle(feed)

    @abstractmethod
    async def _respond(self, feed: Feed, scope: Scope, receive: Receive, send: Send) -> None: ...

    def _note_first(self, stream: RequestStream) -> None:
        if not self._first_s:
            self._first_s = time.monotonic() - self._begin_s
            if stream.is_creator:
                self._service.metrics.first_token(self._pool.name, self._first_s)

    async def _settle(self, feed: Feed) -> None:
        """Leave nothing behind: not the iteration, not a request that nobody wants."""
        stream = feed.stream
        with anyio.CancelScope(shield=True):
            ended = stream.ended
            if ended is None or stream.has_diverged:
                self._why = self._why or "client disconnected"
                await leave(self._pool, stream, self._why)
            await feed.close()
        tell_end(
            self._service,
            self._pool,
            stream,
            ended,
            self._why,
            time.monotonic() - self._begin_s,
            completion_tokens=ended.usage.completion_tokens if ended is not None else None,
            first_token_ms=round(self._first_s * 1000, 1),
        )


class StreamedAnswer(Answer):
    """Server-sent events, one a token that makes text certain; those that have queued up leave in one write.

    `transcript`: how the request becomes events. `waits`: for the first token, so that what fails before it is a status; a reader that
    goes on had its headers long ago.
    """

    def __init__(
        self,
        service: Service,
        pool: ServedPool,
        opening: Opening,
        transcript: Callable[[Request], Transcript],
        *,
        waits: bool = True,
    ) -> None:
        super().__init__(service, pool, opening)
        self._new_transcript = transcript
        self._waits = waits

    async def _respond(self, feed: Feed, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        transcript = self._new_transcript(asked(feed.stream))
        first = asyncio.create_task(feed.first_tokens() if self._waits else feed.next())
        try:
            if self._waits and await has_come(first, receive, settings.headers_after_s) and first.result() is None:
                failure = failure_of(feed.stream, transcript.choices)
                raise failure or RequestFailed("the request ended without a token")
            response = EventStream(
                self._write(feed, transcript, first),
                ping=transcript.ping,
                ping_s=settings.ping_s,
                send_timeout_s=settings.send_timeout_s,
            )
            await response(scope, receive, send)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def _write(
        self, feed: Feed, transcript: Transcript, first: asyncio.Task[list[TokenChunk] | None]
    ) -> AsyncIterator[bytes]:
        """Bytes of events; all tokens that have come by the time of a write leave in it."""
        opening = transcript.opening
        try:
            if not first.done() and opening:
                yield opening
                opening = b""
            chunks = await first
            self._note_first(feed.stream)
            if chunks is not None and is_long(asked(feed.stream)):  # its first events tell of a long prompt
                opening += await asyncio.to_thread(transcript.encode, chunks)
                chunks = []
            while chunks is not None:
                data = opening + transcript.encode(chunks)
                opening = b""
                if data:
                    yield data
                chunks = await feed.next()
            end = self._end(feed.stream, transcript)
        except BatonError as error:
            self._why = error.code
            end = transcript.error(error)
        except Exception:  # the edge: the headers are out, so the only honest end is an error event
            log.exception("an answer could not be written", request_id=feed.stream.id)
            end = transcript.error(RequestFailed("internal error; the server's log has the reason"))
        if last := opening + end:
            yield last

    def _end(self, stream: RequestStream, transcript: Transcript) -> bytes:
        failure = failure_of(stream, transcript.choices)
        if failure is not None:
            self._why = failure.code
            return transcript.error(failure)
        assert stream.ended is not None
        return transcript.end(stream.ended)


class Reader(Protocol):
    """What the tokens of a whole answer are given to."""

    choices: Choices

    def push(self, chunks: Sequence[TokenChunk]) -> object: ...


class WholeAnswer(Answer):
    """One JSON body."""

    async def _respond(self, feed: Feed, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._collect(feed))
        try:
            await has_come(work, receive, None)
            response = Response(work.result(), media_type="application/json")
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await response(scope, receive, send)

    async def _collect(self, feed: Feed) -> bytes:
        request = asked(feed.stream)
        collected = Collected(self._pool.preprocessor.tokenizer, request)
        ended, shape = await self._read(feed, collected), self._service.shapes[request.kind]

        def body() -> bytes:
            return msgspec.json.encode(shape.whole(request, collected.all(), ended))

        return await asyncio.to_thread(body) if is_long(request) else body()

    async def _read(self, feed: Feed, reader: Reader) -> Ended:
        """Give the reader all tokens. Raises what the answer failed of."""
        while (chunks := await feed.next()) is not None:
            self._note_first(feed.stream)
            reader.push(chunks)
        failure = failure_of(feed.stream, reader.choices)
        if failure is not None:
            raise failure
        assert feed.stream.ended is not None
        return feed.stream.ended


def asked(stream: RequestStream) -> Request:
    """What is answered: the request that a key stands for may be another one than was sent."""
    assert stream.request is not None
    return stream.request


def failure_of(stream: RequestStream, choices: Choices) -> BatonError | None:
    """Why the answer is not one, after the stream's end."""
    ended = stream.ended
    if ended is None:
        return RequestFailed("the stream of tokens ended without an end of the request")
    if ended.state == "done" and choices.are_complete:
        return None
    return error_of_end(ended)


def tell_end(
    service: Service,
    pool: ServedPool,
    stream: RequestStream,
    ended: Ended | None,
    why: str,
    seconds: float,
    **more: object,
) -> None:
    """Count and log that the reading of a request is over. `ended`: None where it was left before its end, for `why`."""
    request, state = asked(stream), ended.state if ended is not None else "left"
    if stream.is_creator:
        service.metrics.ended(pool.name, request.kind, state, seconds, ended)
    log.info(
        "request ended" if stream.is_creator else "reader of a request ended",
        request_id=request.id,
        state=state,
        why=why or (ended.reason if ended is not None else ""),
        prompt_tokens=len(request.input.token_ids),
        total_ms=round(seconds * 1000, 1),
        **more,
    )


async def leave(pool: ServedPool, stream: RequestStream, why: str) -> None:
    """Leave a request before its end; should Redis be away, later."""
    try:
        with anyio.fail_after(LEAVE_LIMIT_S):
            await stream.leave(why)
    except (BatonError, TimeoutError) as error:
        log.warning("request not left yet, trying again", request_id=stream.id, error=str(error))
        pool.client.leave_later(stream, why)


async def has_come(work: asyncio.Task[object], receive: Receive, limit_s: float | None) -> bool:
    """Wait for `work`; False when it has not come within `limit_s`. Raises ClientGone when the client leaves before."""
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({work, gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return True
        if gone.done():
            raise ClientGone
        return False
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
