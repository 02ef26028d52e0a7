"""Tokens of a request in, its response out: as a stream, as the answer to who asked for it, and as it stands."""

from __future__ import annotations

from typing import Any

import msgspec

from api.access import Found
from api.answers import WholeAnswer, asked
from pipeline.logprobs import record_bytes, records_between
from pipeline.stream import TokenChunk, ended_of
from pipeline.surface.feed import Feed
from pipeline.surface.response_transcript import ResponseTranscript


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
