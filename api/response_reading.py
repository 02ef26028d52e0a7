"""Tokens of a request in, its response out: as a stream, as the answer to who asked for it, and as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from api.access import Found
from api.answers import WholeAnswer, asked
from api.feed import Feed
from api.shapes.responses import ALL, ResponseShape
from api.transcript import Transcript
from pipeline.logprobs import record_bytes, records_between
from pipeline.protocol import Request
from pipeline.stream import Ended, TokenChunk, ended_of
from pipeline.tokenizer import NoTokenizer, Tokenizer


class ResponseTranscript(Transcript):
    """The events of a response, and the response as it stands behind them. Token by token, so that however many came together the events
    are the same."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request, shape: ResponseShape) -> None:
        super().__init__(tokenizer, request, shape)
        self._events = self._response = shape.events(request)
        self._needs_order = True

    @classmethod
    def unread(cls, tokenizer: Tokenizer | NoTokenizer, request: Request) -> ResponseTranscript:
        """For who wants the response alone."""
        return cls(tokenizer, request, ResponseShape(ALL))

    def push(self, chunks: Sequence[TokenChunk]) -> None:
        """More tokens; nobody reads their events."""
        self.encode(chunks)

    def response(self, ended: Ended | None) -> dict[str, Any]:
        """The response as it stands."""
        return self._response.response(ended)


class WholeResponse(WholeAnswer):
    """The response object, once it is complete."""

    async def _collect(self, feed: Feed) -> bytes:
        transcript = ResponseTranscript.unread(self._pool.preprocessor.tokenizer, asked(feed.stream))
        return msgspec.json.encode(transcript.response(await self._read(feed, transcript)))


def response_of(found: Found) -> dict[str, Any]:
    """A stored response as it stands."""
    request, standing = found.request, found.standing
    transcript = ResponseTranscript.unread(found.pool.preprocessor.tokenizer, request)
    tokens, reason = standing.log.tokens[0], standing.log.finished[0]
    records = records_between(standing.logprobs[0], 0, len(tokens), record_bytes(request.input))
    transcript.push([TokenChunk(0, 0, tokens, reason, records)])
    return transcript.response(ended_of(standing) if standing.has_ended else None)
