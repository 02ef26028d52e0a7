"""Tokens of a request in, its response out: its events, and as it stands behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.protocol import Request
from pipeline.stream import Ended, TokenChunk
from pipeline.surface.shapes.responses import ALL, ResponseShape
from pipeline.surface.transcript import Transcript
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
