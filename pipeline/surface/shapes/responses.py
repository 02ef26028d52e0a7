"""`/v1/responses`: the response object, and the events of its stream.

    sequence number 0     response.created
                          response.queued                      in the background
                          response.in_progress                 in the background: before the first item
                          the items (response_items.py)
                          response.completed | response.incomplete | response.failed

The stream ends with its last event; there is no `[DONE]`. Numbers, ids and bytes are functions of the request and its tokens, so a
reader who has the events up to a number gets exactly the others from any replica.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.answer_form import form_of
from pipeline.errors import BatonError, DeadlineExceeded, InvalidRequest, RequestCancelled, RequestFailed
from pipeline.parsing import Part, PartKind
from pipeline.protocol import Request
from pipeline.stream import Ended, Usage
from pipeline.surface.errors import error_of_end, error_text
from pipeline.surface.feed import Piece
from pipeline.surface.shapes.response_items import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, Items, item_id
from pipeline.surface.sse import PING, line_json, text_json

QUEUED, FAILED, CANCELLED = "queued", "failed", "cancelled"
ENDINGS = (
    RequestFailed,
    RequestCancelled,
    DeadlineExceeded,
)  # of the request itself; others end a reader's stream alone
DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":'
ALL = sys.maxsize  # every event that there could be


def response_id(request: Request) -> str:
    """The id of a response, made from the request's."""
    return f"resp_{request.id}"


class ResponseShape:
    """`after`: the sequence number of the last event that the reader has; `ALL` where nobody reads them."""

    ping = PING

    def __init__(self, after: int = -1) -> None:
        self._after = after

    def events(self, request: Request, begun: Sequence[bool] = ()) -> ResponseEvents:
        """The events behind `after`."""
        return ResponseEvents(request, self._after)


class ResponseEvents:
    """The events of one response, and the response as it stands behind them."""

    def __init__(self, request: Request, after: int = -1) -> None:
        self._request = request
        self._body = form_of(request).body
        self._after = after
        self._number = 0
        self._items = Items(request)
        self._is_begun = self._is_over = False
        self._is_cut = False  # by the longest that was asked for
        self._num_tokens = self._reasoning_tokens = 0
        self._plain = (-1, b"")  # the place of a message, and the fixed part of its deltas
        first = QUEUED if self._is_background else IN_PROGRESS
        self.opening = self._lifecycle("created", first) + self._lifecycle(first, first)

    def piece(self, piece: Piece, logprobs: dict[str, Any] | None, num_tokens: int) -> bytes:
        """Its parts in their order. Log probabilities belong to its content; those of reasoning and calls are not told."""
        if piece.parts is None and logprobs is None and (place := self._items.add_plain(piece.text)) is not None:
            self._num_tokens = num_tokens
            return self._plain_delta(place, piece.text)
        parts = [Part(PartKind.CONTENT, piece.text)] if piece.parts is None else piece.parts
        self._count(parts, num_tokens)
        entries = logprobs["content"] if logprobs is not None else []
        said: list[bytes] = [self._begin()]
        for part in parts:
            is_content = part.kind is PartKind.CONTENT
            said.append(self._tell(self._items.add(part, entries if is_content else [])))
            entries = [] if is_content else entries
        return b"".join(said)

    def finish(
        self,
        choice: int,
        word: str,
        logprobs: dict[str, Any] | None,
        num_tokens: int,
        stop_string: str | None = None,
    ) -> bytes:
        """The last item is over; a call that the answer stops in is torn."""
        self._is_over, self._is_cut = True, word == "length"
        is_torn = self._is_cut or (word == "stop" and self._items.is_in_call)
        begun = self._begin()
        empty = b"" if self._items.has_any else self._tell(self._items.add_nothing())
        return begun + empty + self._tell(self._items.close(INCOMPLETE if is_torn else COMPLETED))

    def end(self, ended: Ended) -> bytes:
        """The response with all that it says."""
        status = INCOMPLETE if self._is_cut else COMPLETED
        return self._tell([(f"response.{status}", {"response": self.response(ended)})])

    def error(self, error: BatonError) -> bytes:
        """The response failed or was cancelled; or only this stream ends, and the response may go on."""
        if isinstance(error, ENDINGS):
            return self._tell([("response.failed", {"response": self._failed(error)})])
        param = error.param if isinstance(error, InvalidRequest) else None
        last = max(self._after, self._number - 1)  # that the reader has: who goes on behind it misses nothing
        return _event("error", last, {"code": error.code, "message": error_text(error), "param": param})

    def response(self, ended: Ended | None) -> dict[str, Any]:
        """The response as it stands. `ended`: how it ended, if it has."""
        if ended is None:
            waits = self._is_background and not self._is_begun
            return self._object(QUEUED if waits else IN_PROGRESS, self._items.output(IN_PROGRESS))
        if ended.state != "done" or not self._is_over:
            return self._failed(error_of_end(ended))
        output, usage = self._items.output(INCOMPLETE), self._usage(ended.usage)
        if self._is_cut:
            details = {"reason": "max_output_tokens"}
            return self._object(INCOMPLETE, output, usage=usage, incomplete_details=details)
        return self._object(COMPLETED, output, usage=usage, completed_at=ended.timeline.ended // 1_000_000)

    @property
    def _is_background(self) -> bool:
        return bool(self._body.get("background"))

    def _failed(self, error: BatonError) -> dict[str, Any]:
        """A response that will never be complete, with what it said until then."""
        output = self._items.output(INCOMPLETE)
        if isinstance(error, RequestCancelled):
            return self._object(CANCELLED, output)
        return self._object(FAILED, output, error={"code": "server_error", "message": error_text(error)})

    def _object(self, status: str, output: list[dict[str, Any]], **known: Any) -> dict[str, Any]:
        """All fields, in OpenAI's order; those that are not known yet are null."""
        return {
            "id": response_id(self._request),
            "object": "response",
            "created_at": self._request.created_s,
            "status": status,
            "background": self._is_background,
            "completed_at": known.get("completed_at"),
            "error": known.get("error"),
            "incomplete_details": known.get("incomplete_details"),
            "model": self._request.input.model,
            **self._body.get("echo", {}),
            "output": output,
            "usage": known.get("usage"),
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _count(self, parts: Iterable[Part], num_tokens: int) -> None:
        """Tokens since the last piece are reasoning where this one is nothing else."""
        if {part.kind for part in parts} == {PartKind.REASONING}:
            self._reasoning_tokens += num_tokens - self._num_tokens
        self._num_tokens = num_tokens

    def _begin(self) -> bytes:
        is_first, self._is_begun = not self._is_begun, True
        return self._lifecycle(IN_PROGRESS, IN_PROGRESS) if is_first and self._is_background else b""

    def _lifecycle(self, name: str, status: str) -> bytes:
        return self._tell([(f"response.{name}", {"response": self._object(status, [])})])

    def _plain_delta(self, place: int, text: str) -> bytes:
        """The event that most of a stream consists of, as `_tell` would make it: its fixed part is made once a message."""
        number, self._number = self._number, self._number + 1
        if number <= self._after:
            return b""
        if self._plain[0] != place:
            at = {"item_id": item_id(self._request.id, "msg", place), "output_index": place}
            fixed = line_json({**at, "content_index": 0, "logprobs": []})
            self._plain = (place, b"," + fixed[1:-1] + b',"delta":')
        return b"%b%d%b%b}\n\n" % (DELTA, number, self._plain[1], text_json(text))

    def _tell(self, events: Iterable[Event]) -> bytes:
        """Number the events, and encode those that the reader does not have."""
        told: list[bytes] = []
        for name, fields in events:
            number, self._number = self._number, self._number + 1
            if number > self._after:
                told.append(_event(name, number, fields))
        return b"".join(told)


def _event(name: str, number: int, fields: dict[str, Any]) -> bytes:
    data = line_json({"type": name, "sequence_number": number, **fields})
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
