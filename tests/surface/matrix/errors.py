"""Errors of each status, in the shape of the clients of the route."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, get_args

from anthropic.types import ErrorObject as MessageErrorObject
from anthropic.types import ErrorResponse, ErrorType
from openai.types import ErrorObject
from openai.types.responses import ResponseErrorEvent

from tests.openai_types import strictly
from tests.surface.matrix import chats, completions, messages, others, responses
from tests.surface.matrix.case import Answer, Case, events_of
from tests.system import POOL

_OBJECTS = get_args(get_args(MessageErrorObject)[0])
TYPED = {kind for model in _OBJECTS for kind in get_args(model.model_fields["type"].annotation)}
UNTYPED = {"request_too_large"}  # which Anthropic's page of errors has, and its SDK has not
LONG = "fox " * 700
AT_ONCE: dict[str, str] = {"X-Request-Timeout": "0.3"}

# what is wrong with a body: fields and the param that is named; code `invalid_request` unless another one is said
WRONG: dict[str, list[tuple[str, dict[str, Any], str, str]]] = {
    "chat": [
        ("no-messages", {"messages": []}, "messages", ""),
        ("role", {"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", ""),
        ("content", {"messages": [{"role": "user"}]}, "messages[0].content", ""),
        ("image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type", "unsupported_parameter"),
        ("tool-without-call", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", ""),
        ("temperature", {"temperature": 3}, "temperature", ""),
        ("n-0", {"n": 0}, "n", ""),
        ("n-65", {"n": 65}, "n", ""),
        ("chat-template", {"chat_template": "{{ messages }}"}, "chat_template", "unsupported_parameter"),
        ("max-tokens-text", {"max_tokens": "5"}, "max_tokens", ""),
        ("max-tokens-0", {"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens", ""),
        ("prompt-logprobs-all", {"prompt_logprobs": -1}, "prompt_logprobs", ""),
        ("stop-empty", {"stop": [""]}, "stop[0]", ""),
        ("stops-17", {"stop": ["x"] * 17}, "stop", ""),
        ("logit-bias", {"logit_bias": {"1": 101}}, "logit_bias[...]", ""),
        ("top-logprobs-alone", {"top_logprobs": 1}, "top_logprobs", ""),
        ("top-logprobs-21", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ""),
        ("stream-options-alone", {"stream_options": {}}, "stream_options", ""),
        ("tier", {"service_tier": "gold"}, "service_tier", ""),
        ("tool-choice-alone", {"tool_choice": "required"}, "tool_choice", ""),
        ("tool-unknown", {"tools": chats.TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", ""),
        ("tool-twice", {"tools": chats.TOOLS[:1] * 2}, "tools[1].function.name", ""),
        ("two-forms", {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", ""),
        ("grammar-broken", {"guided_grammar": "start: ("}, "guided_grammar", ""),
        ("grammar-neither", {"guided_grammar": "root = x"}, "guided_grammar", ""),
        ("regex-broken", {"structured_outputs": {"regex": "("}}, "structured_outputs", ""),
        ("continued-user", {"continue_final_message": True}, "continue_final_message", ""),
        ("variable-reserved", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", ""),
        ("audio", {"audio": {"voice": "x", "format": "mp3"}}, "audio", "unsupported_parameter"),
        ("modalities", {"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ("functions", {"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ("prediction", {"prediction": {"type": "content", "content": "x"}}, "prediction", "unsupported_parameter"),
        ("web-search", {"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ("beam-search", {"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ("token-ids", {"return_token_ids": True}, "return_token_ids", "unsupported_parameter"),
        ("too-long", {"max_tokens": 100_000}, "messages", "context_length_exceeded"),
    ],
    "completion": [
        ("no-prompt", {"prompt": None}, "prompt", ""),
        ("prompt-number", {"prompt": 5}, "prompt", ""),
        ("prompts-mixed", {"prompt": ["a", 5]}, "prompt[1]", ""),
        ("max-tokens-0", {"max_tokens": 0}, "max_tokens", ""),
        ("prompt-logprobs-21", {"prompt_logprobs": 21}, "prompt_logprobs", ""),
        ("token-unknown", {"prompt": [5, 99_999]}, "prompt[1]", ""),
        ("best-of-below-n", {"best_of": 1, "n": 2}, "best_of", ""),
        ("best-of-65", {"best_of": 65}, "best_of", ""),
        ("best-of-streamed", {"best_of": 2, "stream": True}, "best_of", ""),
        ("logprobs-true", {"logprobs": True}, "logprobs", ""),
        ("suffix", {"suffix": "x"}, "suffix", "unsupported_parameter"),
        ("too-long", {"prompt": LONG * 8}, "prompt", "context_length_exceeded"),
    ],
    "response": [
        ("no-input", {"input": []}, "input", ""),
        ("item", {"input": [{"type": "computer_call"}]}, "input[0].type", "unsupported_parameter"),
        ("output-without-call", {"input": [responses.OUTPUT]}, "input[0].call_id", ""),
        ("tool-kind", {"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ("include", {"include": ["x"]}, "include[0]", ""),
        ("metadata", {"metadata": {"x": "y" * 513}}, "metadata[...]", ""),
        ("background-not-stored", {"background": True, "store": False}, "background", ""),
        ("verbosity", {"text": {"verbosity": "high"}}, "text.verbosity", "unsupported_parameter"),
        ("format-broken", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, "text.format", ""),
        ("previous", {"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
        *((name, {name: value}, name, "unsupported_parameter") for name, value in (
            ("conversation", "conv_1"), ("prompt", {"id": "p"}), ("moderation", {"model": "m"}), ("context_management",
                [{"type": "x"}]), ("background_options", {"a": 1}),
        )),
        ("too-long", {"max_output_tokens": 100_000}, "input", "context_length_exceeded"),
    ],
    "embedding": [
        ("no-input", {"input": []}, "input", ""),
        ("empty-text", {"input": ["a", ""]}, "input[1]", ""),
        ("encoding", {"encoding_format": "hex"}, "encoding_format", ""),
        ("dimensions", {"dimensions": 257}, "dimensions", ""),
        ("too-long", {"input": LONG * 8}, "input", "context_length_exceeded"),
    ],
    "message": [
        ("no-messages", {"messages": []}, "messages", ""),
        ("no-max-tokens", {"max_tokens": None}, "max_tokens", ""),
        ("image", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]", ""),
        ("result-without-use", {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages[0].content[0]", ""),
        ("tool-kind", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]", ""),
        ("container", {"container": "c"}, "container", ""),
        ("temperature", {"temperature": 3}, "temperature", ""),
        ("too-long", {"max_tokens": 100_000}, "context", ""),
    ],
}  # fmt: skip
PATHS = {"chat": chats.PATH, "completion": completions.PATH, "response": responses.PATH, "embedding": others.PATH,
    "message": messages.PATH}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "chat": chats.BASE,
    "completion": completions.BASE,
    "response": responses.BASE,
    "embedding": {"model": POOL, "input": "A runner."},
    "message": messages.BASE,
}
LENGTHS = {"chat": "max_tokens", "completion": "max_tokens", "response": "max_output_tokens", "message": "max_tokens"}
LONG_INPUT: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": LONG}]},
    "completion": {"prompt": LONG},
    "response": {"input": LONG},
    "message": {"messages": [{"role": "user", "content": LONG}]},
}


def error_of(body: Mapping[str, Any]) -> ErrorObject:
    """An error as OpenAI's clients read it: all four fields, and nothing beside it."""
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return strictly(ErrorObject, body["error"])


def check(answer: Answer) -> None:
    """An error in OpenAI's shape."""
    error = error_of(answer.json)
    assert error.message and error.code and error.type
    assert answer.headers["x-should-retry"] in ("true", "false")


def check_message_error(answer: Answer) -> None:
    """An error in Anthropic's shape."""
    body = answer.json
    assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
    if body["error"]["type"] in TYPED:
        strictly(ErrorResponse, body)
    assert body["error"]["type"] in {*get_args(ErrorType), *UNTYPED}
    assert answer.headers["request-id"] == body["request_id"]


def names(param: str, code: str) -> Callable[[Answer], None]:
    def check_named(answer: Answer) -> None:
        error = error_of(answer.json)
        assert (error.param, error.code) == (param, code or "invalid_request"), error.message

    return check_named


def mentions(word: str) -> Callable[[Answer], None]:
    def check_mentioned(answer: Answer) -> None:
        assert word in answer.json["error"]["message"], answer.json

    return check_mentioned


def has_code(*codes: str) -> Callable[[Answer], None]:
    def check_code(answer: Answer) -> None:
        assert answer.json["error"].get("code", answer.json["error"]["type"]) in codes, answer.json

    return check_code


def check_late(answer: Answer) -> None:
    """A stream that ends with an error, which is an event like others."""
    answer.num_events = answer.content.count(b"data: ")
    match answer.case.id.split("/")[1]:
        case "message":
            data = json.loads(answer.content.split(b"\n\n")[-2].split(b"\n")[1].removeprefix(b"data: "))
            assert (data["type"], data["error"]["type"]) == ("error", "timeout_error")
            strictly(ErrorResponse, data)
        case "response":
            data = json.loads(answer.content.split(b"\n\n")[-2].split(b"\n")[1].removeprefix(b"data: "))
            if data["type"] == "error":
                strictly(ResponseErrorEvent, data)
            else:
                assert (data["type"], data["response"]["status"]) == ("response.failed", "failed")
                responses.check(answer)
        case _:
            assert error_of(events_of(answer)[-1]).code == "queue_timeout"


def _wrong() -> list[Case]:
    cases: list[Case] = []
    for kind, rows in WRONG.items():
        for name, fields, param, code in rows:
            said = mentions(param) if kind == "message" else names(param, code)
            cases.append(_case(kind, name, 400, said, body=BASES[kind] | fields))
    return cases


def _everywhere() -> list[Case]:
    cases: list[Case] = []
    for kind in PATHS:
        body = BASES[kind]
        cases += [
            _case(kind, "not-json", 400, body=b"{"),
            _case(kind, "no-object", 400, body=b"[]"),
            _case(kind, "no-model", 400, body={name: value for name, value in body.items() if name != "model"}),
            _case(kind, "without-key", 401, body=body, key=None),
            _case(kind, "wrong-key", 401, body=body, key="baton-sk-wrong"),
            _case(kind, "key-of-other-models", 403, body=body, key="other-models"),
            _case(kind, "model-unknown", 404, body=body | {"model": "gpt-unknown"}),
            _case(kind, "method", 405, method="GET"),
            _case(kind, "too-large", 413, body=b" " * 200_001),
            _case(kind, "media-type", 415, body=b"x", headers={"content-type": "text/plain"}),
            _case(kind, "tokens-of-key", 429, body=body, key="few-tokens"),
            _case(kind, "header", 400, body=body, headers={"X-Baton-Linger": "x"}),
        ]
    return cases


def _in_time() -> list[Case]:
    cases: list[Case] = []
    for kind, length in LENGTHS.items():
        long = BASES[kind] | LONG_INPUT[kind]
        endless = BASES[kind] | {length: 3000} | ({} if kind == "message" else {"ignore_eos": True})
        low, high = {"service_tier": "flex"}, {"service_tier": "priority"}
        if kind == "message":
            endless |= {"stop_sequences": ["never said"]}
        else:
            cases += [
                _case(kind, "low-lane-full", 429, has_code("resource_unavailable"), body=long | low),
                _case(kind, "high-lane-full", 503, has_code("overloaded", "refused"), body=long | high),
            ]
        if kind != "message":  # whose answers end by themselves
            cases += [
                Case(id=f"error/{kind}/late", path=PATHS[kind], body=endless | {"stream": True}, headers=AT_ONCE, check=check_late),
            ]  # fmt: skip
            if kind != "response":
                cases.append(_case(kind, "deadline", 504, has_code("queue_timeout"), body=endless, headers=AT_ONCE))
    return cases


def _of_routes() -> list[Case]:
    chat, key = BASES["chat"], {"Idempotency-Key": "matrix"}
    rows: list[tuple[str, str, str, int, str]] = [
        ("model", "GET", "/v1/models/gpt-unknown", 404, ""),
        ("path", "GET", "/v1/nothing", 404, ""),
        ("method-of-models", "POST", "/v1/models", 405, ""),
        ("response", "GET", "/v1/responses/resp_x", 404, ""),
        ("response-items", "GET", "/v1/responses/resp_x/input_items", 404, ""),
        ("response-cancel", "POST", "/v1/responses/resp_x/cancel", 404, ""),
        ("response-delete", "DELETE", "/v1/responses/resp_x", 404, ""),
        ("deleted", "GET", responses.ONE, 404, "response/delete/deleted"),
        ("deleted-again", "DELETE", responses.ONE, 404, "response/delete/deleted"),
        ("not-stored", "GET", responses.ONE, 404, "response/not-stored/whole"),
        ("cancel-of-foreground", "POST", responses.ONE + "/cancel", 400, "response/plain/whole"),
        ("stream-of-response", "GET", "/v1/streams/{id}", 400, "response/plain/whole"),
        ("response-of-a-chat", "GET", responses.ONE, 404, "chat/plain/whole"),
    ]
    queries: list[tuple[str, dict[str, str]]] = [
        ("", {"stream": "maybe"}),
        ("", {"starting_after": "3"}),
        ("", {"stream": "true", "starting_after": "-1"}),
        ("/input_items", {"limit": "0"}),
        ("/input_items", {"order": "up"}),
        ("/input_items", {"after": "x"}),
    ]
    return [
        *(Case(id=f"error/{name}", path=path, method=method, status=status, after=after, check=check) for name, method, path,
            status, after in rows),
        *(
            Case(id=f"error/query-{'-'.join(query)}", path=responses.ONE + more, method="GET", params=query, status=400,
                after="response/plain/whole", check=check)
            for more, query in queries
        ),
        Case(id="chat/keyed/whole", path=chats.PATH, body=chat, headers=key, check=chats.check),
        Case(id="chat/keyed/again", path=chats.PATH, body=chat | {"priority": 1}, headers=key, check=chats.check,
            after="chat/keyed/whole", like="chat/keyed/whole"),
        _case("chat", "key-stands-for-another", 409, body=chat | {"max_tokens": 5}, headers=key, after="chat/keyed/whole"),
        Case(id="message/keyed/whole", path=messages.PATH, body=messages.BASE, headers=key, check=messages.check),
        _case("message", "key-stands-for-another", 409, body=messages.BASE | {"max_tokens": 5}, headers=key, after="message/keyed/whole"),
        Case(id="chat/limited-key/whole", path=chats.PATH, body=chat, key="one-request", check=chats.check),
        _case("chat", "requests-of-key", 429, has_code("rate_limit_exceeded"), body=chat, key="one-request",
            after="chat/limited-key/whole"),
        _case("message", "requests-of-key", 429, body=messages.BASE, key="one-request", after="chat/limited-key/whole"),
        Case(id="error/message/count", path=messages.COUNT, body={}, status=400, check=check_message_error),
    ]  # fmt: skip


def _case(kind: str, name: str, status: int, more: Callable[[Answer], object] | None = None, **fields: Any) -> Case:
    """`more`: what is said beyond the shape of an error on this route."""
    shape = check_message_error if kind == "message" else check
    return Case(id=f"error/{kind}/{name}", path=PATHS[kind], status=status, check=shape, more=more, **fields)


CASES: list[Case] = [*_wrong(), *_everywhere(), *_in_time(), *_of_routes()]
