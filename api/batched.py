"""Several prompts in one completion: each is a request of its own, and all their choices are one answer, in the order of the prompts.

Streamed, the events of all come as they are made: `index` says whose they are, prompt by prompt, `n` for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import anyio
import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from api.answers import Opening, asked, failure_of, has_come
from api.event_stream import EventStream
from api.service import Service
from api.several import Several, SeveralAnswer
from pipeline.errors import BatonError, RequestFailed
from pipeline.pools import ServedPool
from pipeline.stream import RequestStream, TokenChunk, Usage, total
from pipeline.surface.collected import Collected
from pipeline.surface.feed import Feed
from pipeline.surface.logprobs import is_long
from pipeline.surface.shapes.openai import DONE, error_events
from pipeline.surface.sse import PING
from pipeline.surface.transcript import Transcript

log = structlog.get_logger("baton.api")


class BatchedAnswer(SeveralAnswer):
    """One JSON body, with the id of the first of them."""

    def __init__(self, service: Service, pool: ServedPool, openings: Sequence[Opening]) -> None:
        super().__init__(service, pool, openings)
        self._collected: dict[int, Collected] = {}

    async def _read(self, number: int, stream: RequestStream) -> None:
        collected = self._collected[number] = Collected(self._pool.preprocessor.tokenizer, asked(stream))
        async with contextlib.aclosing(aiter(stream)) as items:  # type: ignore[type-var]
            async for chunks in items:
                collected.push(chunks)
        if (failure := failure_of(stream, collected.choices)) is not None:
            raise failure

    async def _body(self) -> bytes:
        is_heavy = any(is_long(asked(stream)) for stream in self._streams)
        return await asyncio.to_thread(self._make) if is_heavy else self._make()

    def _make(self) -> bytes:
        answers = [(asked(stream), self._collected[number].all()) for number, stream in enumerate(self._streams)]
        return msgspec.json.encode(self._service.openai.of_several(answers, _usage(self._streams)))


class BatchedStream(Several):
    """One stream, with the id of the first of them."""

    def __init__(self, service: Service, pool: ServedPool, openings: Sequence[Opening]) -> None:
        super().__init__(service, pool, openings)
        self._feeds: list[Feed] = []
        self._begun: set[str] = set()  # those that have told something
        self._is_interrupted = False

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings, events = self._service.settings, self._events(scope)
        first = asyncio.create_task(_next(events), name="several")
        try:
            with self._service.drain.interrupting(self._interrupt):
                if await has_come(first, receive, settings.headers_after_s):
                    first.result()  # what fails before anything is told has a status
                response = EventStream(
                    self._write(first, events), ping=PING, ping_s=settings.ping_s, send_timeout_s=settings.send_timeout_s
                )  # fmt: skip
                await response(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
                await events.aclose()
        if any(stream.ended is None for stream in self._streams):
            self._why = self._why or "client disconnected"

    def _interrupt(self) -> None:
        self._is_interrupted = True
        for feed in self._feeds:
            feed.interrupt()

    async def _write(self, first: asyncio.Task[bytes], events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            yield await first
            async for data in events:
                yield data
        except BatonError as error:
            self._why = error.code
            yield error_events(error)
        except Exception:  # the edge: the headers are out, so the only honest end is an error event
            log.exception("an answer could not be written", request_id=self._streams[0].id if self._streams else "")
            yield error_events(RequestFailed("internal error; the server's log has the reason"))

    async def _events(self, scope: Scope) -> AsyncGenerator[bytes]:
        """What all of them say, as it comes, and the end. Raises what became of the first that fails."""
        await self._open(scope)
        self._feeds = [Feed(stream) for stream in self._streams]
        if self._is_interrupted:
            self._interrupt()
        transcripts = self._transcripts()
        async with contextlib.aclosing(merged(self._feeds)) as news:
            async for came in news:
                parts = [await self._told(self._streams[at], transcripts[at], chunks) for at, chunks in came]
                if data := b"".join(parts):
                    yield data
        of = asked(self._streams[0])
        usage = self._service.openai.events(of).usage(_usage(self._streams)) if of.include_usage else b""
        yield usage + DONE

    def _transcripts(self) -> list[Transcript]:
        tokenizer, of, first = self._pool.preprocessor.tokenizer, asked(self._streams[0]), 0
        transcripts: list[Transcript] = []
        for stream in self._streams:
            transcripts.append(Transcript(tokenizer, asked(stream), self._service.openai.part(of, first)))
            first += asked(stream).input.sampling_options.n
        return transcripts

    async def _told(self, stream: RequestStream, transcript: Transcript, chunks: list[TokenChunk] | None) -> bytes:
        if chunks is None:
            if (failure := failure_of(stream, transcript.choices)) is not None:
                raise failure
            return b""
        if stream.id in self._begun:
            return transcript.encode(chunks)
        self._begun.add(stream.id)
        if stream.is_creator:
            self._service.metrics.first_token(self._pool.name, time.monotonic() - self._begin_s)
        is_heavy = is_long(asked(stream))  # its first events tell of its prompt
        return await asyncio.to_thread(transcript.encode, chunks) if is_heavy else transcript.encode(chunks)


async def _next(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


async def merged(feeds: Sequence[Feed]) -> AsyncGenerator[list[tuple[int, list[TokenChunk] | None]]]:
    """As soon as something has come: by the number of its feed all that came from each, None where it has ended. Raises what a feed does.

    Nothing more is read while the reader has not come back: what a slow client does not take lies in the streams' own buffers.
    """
    reading = {asyncio.create_task(feed.next()): number for number, feed in enumerate(feeds)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            came = sorted([(reading[task], task.result()) for task in done], key=lambda row: row[0])
            for task in done:
                del reading[task]
            yield came
            more = [number for number, chunks in came if chunks is not None]
            reading |= {asyncio.create_task(feeds[number].next()): number for number in more}
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for feed in feeds:
            await feed.close()


def _usage(streams: Sequence[RequestStream]) -> Usage:
    """What all that have ended took."""
    return total(stream.ended.usage for stream in streams if stream.ended is not None)
