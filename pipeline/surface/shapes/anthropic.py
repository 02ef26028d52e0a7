"""Messages: Anthropic's message object and the events of its streams.

    message_start, ping, then for each block: content_block_start, content_block_delta ..., content_block_stop; message_delta, message_stop

A block is a run of pieces of one kind, so the blocks of a stream are those of the whole answer. A stream that does not become an answer
ends with an error event; there is no `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic_core

from pipeline.answer_form import form_of
from pipeline.errors import BatonError
from pipeline.parsing import Part, PartKind
from pipeline.protocol import Request
from pipeline.stream import Ended, Usage
from pipeline.surface.anthropic_errors import error_body
from pipeline.surface.feed import Piece
from pipeline.surface.said import Block, Said, call_id
from pipeline.surface.sse import line_json, one_line, text_json

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
TIERS = {"high": "priority", "priority": "priority", "default": "standard", "low": "batch", "flex": "batch"}
EMPTY = {
    PartKind.CONTENT: {"type": "text", "text": ""},
    PartKind.REASONING: {"type": "thinking", "thinking": "", "signature": ""},
}


def message_id(request: Request) -> str:
    """Made from the request's, so every reader of a request sees the same one."""
    return f"msg_{request.id}"


def tool_use_id(request: Request, call: int) -> str:
    """The same for every reader of the request."""
    return call_id(request, 0, call, "toolu")


def stop_fields(word: str | None, stop_string: str | None) -> dict[str, Any]:
    """Why a message ended, of OpenAI's `word` for it."""
    reason = "stop_sequence" if stop_string is not None else STOP_REASONS.get(word or "")
    return {"stop_reason": reason, "stop_sequence": stop_string}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Usage as Anthropic counts it: the parts of the prompt add up. Nothing is told of what was kept for others to read."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class AnthropicShape:
    """How messages look."""

    ping = PING

    def events(self, request: Request, begun: Sequence[bool] = ()) -> AnthropicEvents:
        """From the start: these events have no ids."""
        return AnthropicEvents(request)

    def whole(self, request: Request, said: Sequence[Said], ended: Ended) -> dict[str, Any]:
        """The message."""
        (one,) = said
        content = [content_block(request, one, block) for block in one.blocks]
        return message(request, content, stop_fields(one.finish, one.stop_string), ended.usage)


class AnthropicEvents:
    """The events of one message."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._index = -1
        self._open: PartKind | None = None
        self._stop: dict[str, Any] = {}
        start = message(request, [], stop_fields(None, None), Usage(len(request.input.token_ids), 0, 0))
        self.opening = event({"type": "message_start", "message": start}) + PING

    def piece(self, piece: Piece, logprobs: dict[str, Any] | None, num_tokens: int) -> bytes:
        """Deltas, and the borders of blocks between them."""
        parts = [Part(PartKind.CONTENT, piece.text)] if piece.parts is None else piece.parts
        return b"".join([self._part(part) for part in parts])

    def finish(
        self, choice: int, word: str, logprobs: dict[str, Any] | None, num_tokens: int, stop_string: str | None = None
    ) -> bytes:
        """The end of the last block; why the message is over is told with its usage."""
        self._stop = stop_fields(word, stop_string)
        return self._close()

    def end(self, ended: Ended) -> bytes:
        """Why it is over, and what it took."""
        delta = {"type": "message_delta", "delta": self._stop, "usage": usage_fields(ended.usage)}
        return event(delta) + event({"type": "message_stop"})

    def error(self, error: BatonError) -> bytes:
        """The end of a stream that did not become a message."""
        return b"event: error\ndata: " + one_line(error_body(error)) + b"\n\n"

    def _part(self, part: Part) -> bytes:
        match part.kind:
            case PartKind.CONTENT | PartKind.REASONING if part.text:
                opening = b"" if self._open is part.kind else self._start(part.kind, EMPTY[part.kind])
                return opening + self._delta(part.kind, part.text)
            case PartKind.CALL:
                return self._start(part.kind, tool_use(self._request, part.call, part.text, {}))
            case PartKind.ARGUMENTS if part.text:
                return self._delta(part.kind, part.text)
        return b""

    def _start(self, kind: PartKind, block: dict[str, Any]) -> bytes:
        closed = self._close()
        self._index, self._open = self._index + 1, kind
        return closed + event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, kind: PartKind, text: str) -> bytes:
        name, field = _DELTAS[kind]
        head = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":' % (self._index, name, field)
        return b"event: content_block_delta\ndata: " + head + text_json(text) + b"}}\n\n"

    def _close(self) -> bytes:
        """The end of the open block; thoughts are signed, by nobody here."""
        kind, self._open = self._open, None
        if kind is None:
            return b""
        delta = {"type": "signature_delta", "signature": ""}
        signed = {"type": "content_block_delta", "index": self._index, "delta": delta}
        stop = event({"type": "content_block_stop", "index": self._index})
        return (event(signed) if kind is PartKind.REASONING else b"") + stop


_DELTAS = {
    PartKind.CONTENT: (b"text_delta", b"text"),
    PartKind.REASONING: (b"thinking_delta", b"thinking"),
    PartKind.ARGUMENTS: (b"input_json_delta", b"partial_json"),
}


def event(value: dict[str, Any]) -> bytes:
    """One event; its name is its type."""
    name: str = value["type"]
    return b"event: " + name.encode() + b"\ndata: " + line_json(value) + b"\n\n"


def message(request: Request, content: list[dict[str, Any]], stop: dict[str, Any], usage: Usage) -> dict[str, Any]:
    """The message object; the service tier only where one was asked for."""
    tier = form_of(request).service_tier
    return {
        "id": message_id(request),
        "type": "message",
        "role": "assistant",
        "model": request.input.model,
        "content": content,
        **stop,
        "usage": usage_fields(usage) | ({"service_tier": TIERS.get(tier, "standard")} if tier else {}),
    }


def content_block(request: Request, said: Said, block: Block) -> dict[str, Any]:
    """One block of a message that is complete."""
    text = "".join(block.pieces)
    match block.kind:
        case PartKind.REASONING:
            return EMPTY[block.kind] | {"thinking": text}
        case PartKind.CALL:
            return tool_use(request, block.call, text, parsed_input(said.calls[block.call].arguments))
    return EMPTY[PartKind.CONTENT] | {"text": text}


def tool_use(request: Request, call: int, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with what it is given."""
    return {"type": "tool_use", "id": tool_use_id(request, call), "name": name, "input": given}


def parsed_input(arguments: str) -> dict[str, Any]:
    """The object in this JSON; where the answer ended too early, as much of it as came, as the official client reads a stream."""
    try:
        value = pydantic_core.from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
