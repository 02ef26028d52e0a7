"""Bodies that are shown on the page, for the built-in model with the torch engine. An answer is shown where all of it is certain, but for
ids and times. A test sends each of them and gets what it claims."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.builtin import BUILTIN_MODEL

ID = f"{BUILTIN_MODEL}-J3pWmYbHq0eZtR5vXkLs2A"  # as ids look: no request has it
FILE_ID = "file-0662f1b6d1a0f31f0c5a9be2d84767a0c1d5f3e2b4a697"  # as those of files look
BATCH_ID = "batch_0662f1b6d1a0f31f0c5a9be2d84767a0c1d5f3e2b4a697"  # and as those of batches
USER = {"role": "user", "content": "What is 7 times 8?"}
SUM = "7 * 8 = 56"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A body by its name, the status of its answer, and the answer where all of it is known."""

    name: str
    summary: str
    body: dict[str, Any]
    status: int = 200
    answer: dict[str, Any] | None = None


def _error(message: str, param: str | None, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _of(**fields: Any) -> dict[str, Any]:
    return {"model": BUILTIN_MODEL, **fields}


def _chat(**fields: Any) -> dict[str, Any]:
    return _of(messages=[USER], temperature=0, **fields)


def _response(**fields: Any) -> dict[str, Any]:
    return _of(**{"input": USER["content"], "temperature": 0, **fields})


_NO_MODEL = _error("model 'gpt-5' does not exist; see /v1/models", "model", "model_not_found")
NOT_FOUND = _error(f"{ID}: no request has this id, or its record has expired", "id", "request_not_found")

NO_FILE = _error(f"No such File object: {FILE_ID}", "id", "file_not_found")
NO_BATCH = _error(f"No batch found with id '{BATCH_ID}'", "id", "batch_not_found")

CHATS = (
    Example(
        "whole", "The answer as a whole", _chat(),
        answer={
            "id": f"chatcmpl-{ID}", "object": "chat.completion", "created": 1735689600, "model": BUILTIN_MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": SUM}, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22, "prompt_tokens_details": {"cached_tokens": 0},
            },
        },
    ),
    Example("stream", "A stream with usage in its end", _chat(stream=True, stream_options={"include_usage": True})),
    Example("choices", "Two answers, sampled", _of(messages=[USER], n=2, seed=1, temperature=0.8, max_tokens=16)),
    Example(
        "tool", "A function that must be called", _chat(
            tools=[{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}], tool_choice="required", max_tokens=48,
        ),
    ),
    Example(
        "form", "JSON by a schema", _chat(
            response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": WEATHER}}, max_tokens=48,
        ),
    ),
    Example("logprobs", "Log probabilities of the three likeliest", _chat(logprobs=True, top_logprobs=3, max_tokens=4)),
    Example(
        "too warm", "A value out of its bounds", _chat() | {"temperature": 3}, 400,
        _error("temperature: expected `float` <= 2.0", "temperature", "invalid_request"),
    ),
    Example("no such model", "A model that is not served", _chat() | {"model": "gpt-5"}, 404, _NO_MODEL),
)  # fmt: skip

COMPLETIONS = (
    Example("text", "A text goes on", _of(prompt="Once upon a time", max_tokens=16, temperature=0)),
    Example("stream", "The same as a stream", _of(prompt="Once upon a time", max_tokens=16, temperature=0, stream=True)),
    Example("ids", "Token ids in, token ids out", _of(prompt=[1, 1634, 313, 226], max_tokens=4, temperature=0, return_token_ids=True)),
    Example("scored", "Log probabilities of a prompt", _of(prompt="Once upon a time", max_tokens=0, echo=True, logprobs=2)),
    Example("ranked", "The same as vLLM tells them", _of(prompt="Once upon a time", max_tokens=2, temperature=0, prompt_logprobs=2)),
    Example("several", "Several prompts", _of(prompt=["Once upon a time", "The sea"], max_tokens=4, temperature=0)),
)  # fmt: skip

MESSAGES = (
    Example(
        "whole", "The answer as a whole", _of(max_tokens=64, messages=[USER], temperature=0),
        answer={
            "id": f"msg_{ID}", "type": "message", "role": "assistant", "model": BUILTIN_MODEL,
            "content": [{"type": "text", "text": SUM}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": 13, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 9},
        },
    ),
    Example("stream", "As a stream", _of(max_tokens=64, messages=[USER], temperature=0, stream=True)),
    Example(
        "no maximum", "Anthropic wants max_tokens", _of(messages=[USER]), 400,
        {
            "type": "error", "request_id": "r",
            "error": {"type": "invalid_request_error", "message": "max_tokens: required field is missing"},
        },
    ),
)  # fmt: skip

COUNTS = (Example("prompt", "The tokens of a prompt", _of(messages=[USER]), answer={"input_tokens": 13}),)

EMBEDDINGS = (
    Example("texts", "Two texts", _of(input=["A small fox", "The sea"])),
    Example("base64", "As OpenAI's clients ask for it", _of(input="A small fox", encoding_format="base64")),
)

TOKENIZE = (
    Example(
        "prompt", "A text", _of(prompt="Count to 12.", return_token_strs=True),
        answer={
            "count": 7, "max_model_len": 4096, "tokens": [1, 1634, 313, 226, 22, 23, 19],
            "token_strs": ["<|bos|>", "Count", "Ġto", "Ġ", "1", "2", "."],
        },
    ),
    Example("messages", "A chat by the model's template", _of(messages=[USER])),
)  # fmt: skip

DETOKENIZE = (
    Example("tokens", "Token ids", _of(tokens=[1634, 313, 226, 22, 23, 19]), answer={"prompt": "Count to 12."}),
)

RESPONSES = (
    Example("whole", "The answer as a whole", _response()),
    Example("stream", "Its events", _response(stream=True)),
    Example("background", "Answered at once, read later", _response(background=True)),
    Example(
        "conversation", "Items as input", _response(
            input=[
                {"role": "user", "content": "My name is Clara."},
                {"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
            ],
        ),
    ),
    Example(
        "nothing before", "A response to go on from that is not there", _response(previous_response_id=f"resp_{ID}"), 400,
        _error(
            f"previous response: {ID}: no request has this id, or its record has expired", "previous_response_id",
            "previous_response_not_found",
        ),
    ),
)  # fmt: skip

_BATCH = {"input_file_id": FILE_ID, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
_HOUR = {"completion_window": "1h", "output_expires_after": {"anchor": "created_at", "seconds": 86_400}}
_NO_INPUT = _error(f"input_file_id: No such File object: {FILE_ID}", "input_file_id", "invalid_request")
_WINDOW = "completion_window: expected 24h or another number of s, m, h or d, up to 30d, not '31d'"
BATCHES = (
    Example("no such file", "A file of chats, which is not there", _BATCH, 400, _NO_INPUT),
    Example(
        "an hour", "To be done within an hour; results live for a day", _BATCH | _HOUR | {"metadata": {"of": "tonight"}}, 400, _NO_INPUT
    ),
    Example(
        "too long", "A window out of its bounds", _BATCH | {"completion_window": "31d"}, 400,
        _error(_WINDOW, "completion_window", "invalid_request"),
    ),
)  # fmt: skip
