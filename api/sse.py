"""Server-sent events in OpenAI's form, made from bytes that are fixed for a request and the JSON of a piece of text.

What clients need (each point broke one of them): `\\n` as separator, no `id:` lines unless asked for, no event without data, a comment as
one line without a blank one behind it, and an end that says so: `[DONE]` after the answer, an error event and `[DONE]` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from api.errors import error_json
from pipeline.errors import BatonError
from pipeline.protocol import FinishReason, Request
from pipeline.stream import Usage

DONE = b"data: [DONE]\n\n"
PING = b": ping\n"  # with a blank line it would be an empty event to clients that have seen other fields

FINISH_WORDS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}

SERVICE_TIER = "service_tier:"  # in front of the tier that is told, among the annotations of a request
RETURN_TOKEN_IDS = "return_token_ids"  # the annotation of a request whose answer tells its tokens

_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_encode = msgspec.json.Encoder().encode


def answer_id(request: Request) -> str:
    """The id of an answer in OpenAI's style; made from the request's, so every reader of a request sees the same one."""
    return f"{'chatcmpl' if is_chat(request) else 'cmpl'}-{request.id}"


def answer_head(request: Request, kind: str) -> dict[str, object]:
    """The fields in front of every answer and chunk; the service tier only where one was asked for."""
    head: dict[str, object] = {
        "id": answer_id(request),
        "object": kind,
        "created": request.created_s,
        "model": request.input.model,
    }
    for annotation in request.input.annotations:
        if annotation.startswith(SERVICE_TIER):
            head["service_tier"] = annotation.removeprefix(SERVICE_TIER)
    return head


def tells_tokens(request: Request) -> bool:
    """Whether the answer tells token ids beside the text."""
    return RETURN_TOKEN_IDS in request.input.annotations


def choice_body(
    request: Request,
    index: int,
    text: str,
    token_ids: Sequence[int],
    finish_word: str | None,
    logprobs: dict[str, object] | None = None,
) -> dict[str, object]:
    """One choice of a whole answer."""
    said: dict[str, object] = (
        {"message": {"role": "assistant", "content": text}} if is_chat(request) else {"text": text}
    )
    if tells_tokens(request):
        said |= {"token_ids": token_ids, "prompt_token_ids": request.input.token_ids}
    if logprobs is not None:
        said["logprobs"] = logprobs
    return {"index": index, **said, "finish_reason": finish_word}


def is_chat(request: Request) -> bool:
    """Whether the answer is a message; else it is text."""
    return request.kind == "chat.completion"


def text_json(text: str) -> bytes:
    """A JSON string without any character that some client takes for the end of a line."""
    data = _encode(text)
    return data if text.isascii() else one_line(data)


def one_line(data: bytes) -> bytes:
    """The same JSON on one line for every client."""
    for char, escaped in _LINE_ENDS:
        data = data.replace(char, escaped)
    return data


def usage_fields(usage: Usage) -> dict[str, object]:
    """Usage as OpenAI counts it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def error_events(error: BatonError) -> bytes:
    """The end of a stream that did not become an answer; the error has one line, as JSON always has here."""
    return b"data: " + error_json(error) + b"\n\n" + DONE


class Events:
    """The events of one answer. All choices' fixed parts are made once; a piece of text costs one JSON string."""

    def __init__(self, request: Request) -> None:
        chat = is_chat(request)
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._base = _encode(answer_head(request, kind))[:-1]
        before, self._after_text = (
            (b'"delta":{"content":', b'},"finish_reason":null}]}\n\n')
            if chat
            else (b'"text":', b',"finish_reason":null}]}\n\n')
        )
        self._behind_text = b"}" if chat else b""
        self._last = b'"delta":{},' if chat else b'"text":"",'
        choices = range(request.input.sampling_options.n)
        self._before_text = [self._head(choice) + before for choice in choices]
        role = b'"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
        self.openings = [self._head(choice) + role for choice in choices] if chat else []
        self.opening = b"".join(self.openings)

    def piece(
        self, choice: int, text: str, token_ids: Sequence[int] = (), logprobs: dict[str, object] | None = None
    ) -> bytes:
        """An event with a piece of text, which is never empty, or with tokens, whose text may be."""
        beside = self._beside(choice, token_ids, logprobs)
        if not beside:
            return self._before_text[choice] + text_json(text) + self._after_text
        said = self._behind_text + b"," + beside
        return self._before_text[choice] + text_json(text) + said + b'"finish_reason":null}]}\n\n'

    def finish(self, choice: int, reason: FinishReason, logprobs: dict[str, object] | None = None) -> bytes:
        """The last event of a choice. Its tokens have been told."""
        said = self._last + self._beside(choice, (), logprobs)
        return self._head(choice) + said + b'"finish_reason":"' + FINISH_WORDS[reason].encode() + b'"}]}\n\n'

    def usage(self, usage: Usage) -> bytes:
        """The event after the last choice for those who asked for it; it has no choices."""
        return b"data: " + self._base + b',"choices":[],"usage":' + _encode(usage_fields(usage)) + b"}\n\n"

    def _beside(self, choice: int, token_ids: Sequence[int], logprobs: dict[str, object] | None) -> bytes:
        """What is told beside a text: fields of JSON, each with a comma behind it."""
        return b"" if logprobs is None else b'"logprobs":' + one_line(_encode(logprobs)) + b","

    def _head(self, choice: int) -> bytes:
        return b"data: " + self._base + b',"choices":[{"index":%d,' % choice


class TokenEvents(Events):
    """The same with the token ids of each piece, and those of the prompt in the first event of each choice, as vLLM tells them.

    `is_begun`: the choices whose first event somebody else has sent.
    """

    def __init__(self, request: Request, is_begun: Sequence[bool]) -> None:
        super().__init__(request)
        prompt = b'"prompt_token_ids":' + _encode(request.input.token_ids) + b","
        self._prompt = [b"" if begun else prompt for begun in is_begun]

    def _beside(self, choice: int, token_ids: Sequence[int], logprobs: dict[str, object] | None) -> bytes:
        prompt, self._prompt[choice] = self._prompt[choice], b""
        told = b'"token_ids":' + _encode(token_ids) + b"," + prompt
        return told + super()._beside(choice, token_ids, logprobs)
