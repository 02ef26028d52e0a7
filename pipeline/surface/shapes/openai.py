"""Chat completions and completions: OpenAI's chunks, made from bytes that are fixed for a request and the JSON of a piece of text.

A piece of plain text costs one JSON string. Whatever has more beside it (token ids, log probabilities, reasoning, calls, usage so far) is
made as a whole. The end of a stream says so: `[DONE]` behind the answer, an error event and `[DONE]` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.answer_form import form_of
from pipeline.errors import BatonError
from pipeline.parsing import Part, PartKind
from pipeline.protocol import Request
from pipeline.stream import Ended, Usage
from pipeline.surface.errors import error_json
from pipeline.surface.feed import Piece
from pipeline.surface.said import Said, call_id, is_parsed
from pipeline.surface.shape import StreamShape
from pipeline.surface.sse import PING, line_json, text_json

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def is_chat(request: Request) -> bool:
    """Whether the answer is chunks with a `delta`; else they have a `text`."""
    return request.kind == "chat.completion"


def answer_id(request: Request) -> str:
    """The id of an answer in OpenAI's style; made from the request's, so every reader of a request sees the same one."""
    return f"{'chatcmpl' if is_chat(request) else 'cmpl'}-{request.id}"


def answer_head(request: Request, kind: str) -> dict[str, Any]:
    """The fields in front of every answer and chunk; the service tier only where one was asked for."""
    head: dict[str, Any] = {
        "id": answer_id(request),
        "object": kind,
        "created": request.created_s,
        "model": request.input.model,
    }
    if tier := form_of(request).service_tier:
        head["service_tier"] = tier
    return head


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI counts it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class OpenAIShape:
    """`reasoning_field`: the name of a message's reasoning, which OpenAI's chats do not have."""

    ping = PING

    def __init__(self, reasoning_field: str) -> None:
        self._reasoning_field = reasoning_field

    def events(self, request: Request, begun: Sequence[bool] = ()) -> OpenAIEvents:
        """`begun`: the choices whose first event somebody else has sent."""
        return self.events_in(request, begun, request, 0)

    def events_in(self, request: Request, begun: Sequence[bool], of: Request, first: int) -> OpenAIEvents:
        """As `events`, of a part of an answer."""
        return OpenAIEvents(request, self._reasoning_field, begun, of, first)

    def part(self, of: Request, first: int) -> StreamShape:
        """For the events of one of several requests whose choices are one answer, told as `of` is: numbered from `first` on."""
        return _Part(self, of, first)

    def whole(self, request: Request, said: Sequence[Said], ended: Ended) -> dict[str, Any]:
        """The answer as one object."""
        return self.of_several([(request, said)], ended.usage)

    def of_several(self, answers: Sequence[tuple[Request, Sequence[Said]]], usage: Usage) -> dict[str, Any]:
        """Several requests as one object, which has the id of the first of them; their choices are numbered in one row."""
        choices: list[dict[str, Any]] = []
        for request, said in answers:
            choices += self.choices(request, said, len(choices))
        return self.of_choices(answers[0][0], choices, usage) | self.of_prompt(*answers[0])

    def of_prompt(self, request: Request, said: Sequence[Said]) -> dict[str, Any]:
        """What a chat tells of its prompt, beside the choices; in completions each of them does."""
        prompt = said[0].prompt_logprobs if is_chat(request) else None
        return {} if prompt is None else {"prompt_logprobs": prompt}

    def of_choices(self, request: Request, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The same of choices that are made already."""
        return {**answer_head(request, request.kind), "choices": choices, "usage": usage_fields(usage)}

    def choices(self, request: Request, said: Sequence[Said], first: int = 0) -> list[dict[str, Any]]:
        """The choices of it, numbered from `first` on."""
        tells_tokens = form_of(request).return_token_ids
        return [self._choice(request, index, one, tells_tokens) for index, one in enumerate(said, start=first)]

    def _choice(self, request: Request, index: int, said: Said, tells_tokens: bool) -> dict[str, Any]:
        fields: dict[str, Any] = (
            {"message": self._message(request, index, said)} if is_parsed(request) else {"text": said.content}
        )
        if tells_tokens:
            fields |= {"token_ids": said.token_ids, "prompt_token_ids": request.input.token_ids}
        if said.logprobs is not None:
            fields["logprobs"] = said.logprobs
        if said.prompt_logprobs is not None and not is_chat(request):
            fields["prompt_logprobs"] = said.prompt_logprobs
        return {"index": index, **fields, "finish_reason": said.finish}

    def _message(self, request: Request, index: int, said: Said) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": said.content if not said.calls or said.content else None,
        }
        if said.reasoning:
            message[self._reasoning_field] = said.reasoning
        if said.calls:
            message["tool_calls"] = [
                {
                    "id": call_id(request, index, number),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(said.calls)
            ]
        return message


class _Part:
    """See `OpenAIShape.part`."""

    ping = PING

    def __init__(self, shape: OpenAIShape, of: Request, first: int) -> None:
        self._shape, self._of, self._first = shape, of, first

    def events(self, request: Request, begun: Sequence[bool] = ()) -> OpenAIEvents:
        """See `StreamShape.events`."""
        return self._shape.events_in(request, begun, self._of, self._first)


class OpenAIEvents:
    """The events of one answer, or of a part of it: it is told as that of `of`, and its choices are numbered from `first` on. All choices'
    fixed parts are made once."""

    def __init__(self, request: Request, reasoning_field: str, begun: Sequence[bool], of: Request, first: int) -> None:
        chat, form = is_chat(request), form_of(request)
        self._request = request
        self._reasoning_field = reasoning_field
        self._tells_tokens, self._counts = form.return_token_ids, form.continuous_usage
        self._first = first
        self._base = _encode(answer_head(of, "chat.completion.chunk" if chat else "text_completion"))[:-1]
        choices = range(request.input.sampling_options.n)
        before, self._after_text = (
            (b'"delta":{"content":', b'},"finish_reason":null}]}\n\n')
            if chat
            else (b'"text":', b',"finish_reason":null}]}\n\n')
        )
        self._before_text = [self._head(choice) + before for choice in choices]
        self._is_plain = not (self._tells_tokens or self._counts)
        self._prompt_told = [False] * len(choices) if not begun else list(begun)
        self._prompt_logprobs: list[Any] | None = None
        self._lacks_logprobs = {
            choice for choice in choices if not (begun and begun[choice])
        }  # choices without those of the prompt
        if chat and any(begun):  # there the first event of all has them
            self._lacks_logprobs.clear()
        role = {"role": "assistant", "content": ""}
        self.openings = [self._event(choice, {"delta": role}, None, 0) for choice in choices] if chat else []
        self.opening = b"".join(self.openings)

    def tell_prompt(self, logprobs: list[Any]) -> None:
        """What each choice's next event tells of the prompt; in a chat, the next event alone."""
        self._prompt_logprobs, self._is_plain = logprobs, False

    def piece(self, piece: Piece, logprobs: dict[str, Any] | None, num_tokens: int) -> bytes:
        """An event with a piece of text, which is never empty, or with tokens, whose text may be."""
        if self._is_plain and logprobs is None and piece.parts is None:
            return self._before_text[piece.choice] + text_json(piece.text) + self._after_text
        fields: dict[str, Any] = self._fields(piece)
        if self._tells_tokens:
            fields |= self._tokens(piece.choice, piece.token_ids)
        if logprobs is not None:
            fields["logprobs"] = logprobs
        return self._event(piece.choice, fields, None, num_tokens)

    def finish(
        self, choice: int, word: str, logprobs: dict[str, Any] | None, num_tokens: int, stop_string: str | None = None
    ) -> bytes:
        """The last event of a choice. Its tokens have been told."""
        fields: dict[str, Any] = {"delta": {}} if is_chat(self._request) else {"text": ""}
        if self._tells_tokens:
            fields |= self._tokens(choice, ())
        if logprobs is not None:
            fields["logprobs"] = logprobs
        return self._event(choice, fields, word, num_tokens)

    def end(self, ended: Ended) -> bytes:
        """Usage for those who asked for it, and the word that says that nothing is missing."""
        return (self.usage(ended.usage) if self._request.include_usage else b"") + DONE

    def usage(self, usage: Usage) -> bytes:
        """The event after the last choice; it has no choices."""
        return b"data: " + self._base + b',"choices":[],"usage":' + _encode(usage_fields(usage)) + b"}\n\n"

    def error(self, error: BatonError) -> bytes:
        """The end of a stream that did not become an answer."""
        return error_events(error)

    def _fields(self, piece: Piece) -> dict[str, Any]:
        if not is_chat(self._request):
            return {"text": piece.text}
        return {"delta": {"content": piece.text} if piece.parts is None else self._delta(piece.choice, piece.parts)}

    def _delta(self, choice: int, parts: Sequence[Part]) -> dict[str, Any]:
        """All parts of a piece in one delta: an event is one place to go on from."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            match part.kind:
                case PartKind.CONTENT:
                    delta["content"] = delta.get("content", "") + part.text
                case PartKind.REASONING:
                    delta[self._reasoning_field] = delta.get(self._reasoning_field, "") + part.text
                case PartKind.CALL:
                    opened = {"id": call_id(self._request, choice, part.call), "type": "function"}
                    calls[part.call] = {"index": part.call, **opened, "function": {"name": part.text, "arguments": ""}}
                case PartKind.ARGUMENTS:
                    call = calls.setdefault(part.call, {"index": part.call, "function": {"arguments": ""}})
                    call["function"]["arguments"] += part.text
        return {**delta, "tool_calls": list(calls.values())} if calls else delta

    def _tokens(self, choice: int, token_ids: Sequence[int]) -> dict[str, Any]:
        """Those of an event, and the prompt's in the first one of a choice, as vLLM tells them."""
        is_first, self._prompt_told[choice] = not self._prompt_told[choice], True
        prompt = {"prompt_token_ids": self._request.input.token_ids} if is_first else {}
        return {"token_ids": token_ids, **prompt}

    def _event(self, choice: int, fields: dict[str, Any], word: str | None, num_tokens: int) -> bytes:
        prompt = self._take_prompt(choice)
        of_choice, of_answer = ({}, prompt) if is_chat(self._request) else (prompt, {})
        said = line_json({**fields, **of_choice, "finish_reason": word})[1:]
        beside = b"," + line_json(of_answer)[1:-1] if of_answer else b""
        return self._head(choice) + said + b"]" + beside + self._usage_so_far(num_tokens) + b"}\n\n"

    def _take_prompt(self, choice: int) -> dict[str, Any]:
        if self._prompt_logprobs is None or choice not in self._lacks_logprobs:
            return {}
        self._lacks_logprobs -= self._lacks_logprobs if is_chat(self._request) else {choice}
        return {"prompt_logprobs": self._prompt_logprobs}

    def _usage_so_far(self, num_tokens: int) -> bytes:
        if not self._counts:
            return b""
        prompt = len(self._request.input.token_ids)
        counts = {"prompt_tokens": prompt, "completion_tokens": num_tokens, "total_tokens": prompt + num_tokens}
        return b',"usage":' + _encode(counts)

    def _head(self, choice: int) -> bytes:
        return b"data: " + self._base + b',"choices":[{"index":%d,' % (self._first + choice)


def error_events(error: BatonError) -> bytes:
    """An error event and `[DONE]`; the error has one line, as JSON always has here."""
    return b"data: " + error_json(error) + b"\n\n" + DONE
