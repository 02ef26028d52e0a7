"""What an answer looks like: the contract of the shapes in `shapes/`, one for each kind of request.

A request is read by somebody else, token by token; a shape makes its events, or its one body, of what the choices say. It has no state of
its own, so every replica makes the same bytes of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.errors import BatonError
from pipeline.protocol import Request
from pipeline.stream import Ended
from pipeline.surface.feed import Piece
from pipeline.surface.said import Said


class Events(Protocol):
    """The events of one answer, in order: the opening, pieces, a finish for each choice, the end; an error instead of the end."""

    @property
    def opening(self) -> bytes: ...

    def piece(self, piece: Piece, logprobs: dict[str, Any] | None, num_tokens: int) -> bytes:
        """What these tokens make certain. `num_tokens`: of all choices so far."""
        ...

    def finish(
        self, choice: int, word: str, logprobs: dict[str, Any] | None, num_tokens: int, stop_string: str | None = None
    ) -> bytes:
        """A choice is over, for OpenAI's reason `word`; its text has been told. `stop_string`: the one that ended it, if one did."""
        ...

    def end(self, ended: Ended) -> bytes:
        """The answer is complete."""
        ...

    def error(self, error: BatonError) -> bytes:
        """The answer will not be complete. The last event of its stream."""
        ...


class StreamShape(Protocol):
    """How streams of one kind look. `ping`: what is sent while there is nothing to tell, between any two events."""

    @property
    def ping(self) -> bytes: ...

    def events(self, request: Request, begun: Sequence[bool] = ()) -> Events:
        """`begun`: the choices whose first event a reader has already; only for kinds whose streams go on at an event's id."""
        ...


class Shape(StreamShape, Protocol):
    """How answers of one kind look."""

    def whole(self, request: Request, said: Sequence[Said], ended: Ended) -> dict[str, Any]:
        """The body of an answer that is complete."""
        ...
