"""The bytes of a stream: what every client of the chat API must be able to read."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from api.errors import error_response
from pipeline.answer_form import AnswerForm, with_form
from pipeline.errors import (
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    IdempotencyConflict,
    InvalidKey,
    InvalidRequest,
    KeyBusy,
    NotAllowed,
    QueueFull,
    RateLimited,
    RedisUnavailable,
    RequestFailed,
    RequestNotFound,
)
from pipeline.parsing import Part, PartKind
from pipeline.protocol import BackendInput, FinishReason, Request, SamplingOptions, StopConditions, Timeline
from pipeline.stream import Ended, Usage
from pipeline.surface.errors import TABLE, error_json, error_of_end, row_of
from pipeline.surface.feed import Piece
from pipeline.surface.said import call_id, finish_word
from pipeline.surface.shapes.openai import DONE, OpenAIEvents, OpenAIShape, error_events
from pipeline.surface.sse import PING, text_json

ID = "tiny-AAAAAAAAAAAAAAAAAAAAAA"


SHAPE = OpenAIShape("reasoning_content")


def events(kind: str = "chat.completion", n: int = 1) -> OpenAIEvents:
    return SHAPE.events(plain_request(kind, n))


def piece(choice: int, text: str, token_ids: Sequence[int] = (), parts: list[Part] | None = None) -> Piece:
    return Piece(choice, text, token_ids, None, parts)


def plain_request(kind: str = "text_completion", n: int = 1) -> Request:
    body = BackendInput(
        request_id=ID,
        model="tiny",
        token_ids=[1],
        stop_conditions=StopConditions(max_tokens=1),
        sampling_options=SamplingOptions(n=n),
    )
    return Request(id=ID, kind=kind, created_s=1_795_345_812, input=body)


def parse(data: bytes) -> list[object]:
    """The JSON of each event; the bytes must be nothing but `data:` lines, each followed by a blank one."""
    assert data.endswith(b"\n\n")
    lines = data[:-2].split(b"\n\n")
    assert all(line.startswith(b"data: ") and b"\n" not in line and b"\r" not in line for line in lines)
    assert all(line != b"data: " for line in lines)
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line != b"data: [DONE]"]


def chunk(**fields: object) -> dict[str, object]:
    head = {"id": f"chatcmpl-{ID}", "object": "chat.completion.chunk", "created": 1_795_345_812, "model": "tiny"}
    return head | fields


def test_chat_chunks_have_openais_order_and_fields() -> None:
    made = events(n=2)
    opening = [
        chunk(choices=[{"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for i in (0, 1)
    ]
    assert parse(made.opening) == opening
    text = chunk(choices=[{"index": 1, "delta": {"content": 'a "b"\n'}, "finish_reason": None}])
    assert parse(made.piece(piece(1, 'a "b"\n'), None, 1)) == [text]
    assert parse(made.finish(0, "stop", None, 1)) == [
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    ]
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert parse(made.usage(Usage(3, 4, 2))) == [chunk(choices=[], usage=usage)]


def test_completion_chunks_carry_text() -> None:
    made = events("text_completion")
    assert made.opening == b""
    (text,) = parse(made.piece(piece(0, "é"), None, 1))
    assert text == {
        "id": f"cmpl-{ID}",
        "object": "text_completion",
        "created": 1_795_345_812,
        "model": "tiny",
        "choices": [{"index": 0, "text": "é", "finish_reason": None}],
    }
    (finish,) = parse(made.finish(0, "length", None, 1))
    assert finish["choices"] == [{"index": 0, "text": "", "finish_reason": "length"}]  # type: ignore[index]


def test_token_ids_stand_beside_the_text_and_the_prompts_in_the_first_event_of_each_choice() -> None:
    plain = events("text_completion", n=3)
    body = plain_request(n=3)
    body = structs.replace(body, input=with_form(body.input, AnswerForm(return_token_ids=True)))
    made = SHAPE.events(body, [False, True, False])
    (first,) = parse(made.piece(piece(0, "é", [7, 8]), None, 2))
    (second,) = parse(made.piece(piece(0, "", [9]), None, 3))
    (other,) = parse(made.piece(piece(1, "x", [5]), None, 4))
    (finish,) = parse(made.finish(2, "length", None, 1))
    head = {key: value for key, value in parse(plain.piece(piece(0, "é"), None, 1))[0].items() if key != "choices"}  # type: ignore[attr-defined]
    told = {"index": 0, "text": "é", "token_ids": [7, 8], "prompt_token_ids": [1], "finish_reason": None}
    assert first == head | {"choices": [told]}
    assert choice_of(second) == {"index": 0, "text": "", "token_ids": [9], "finish_reason": None}
    assert choice_of(other) == {"index": 1, "text": "x", "token_ids": [5], "finish_reason": None}
    assert choice_of(finish) == {"index": 2, "text": "", "token_ids": [], "prompt_token_ids": [1], "finish_reason": "length"}  # fmt: skip


def choice_of(event: object) -> object:
    return event["choices"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("reason", "word"), [(FinishReason.EOS, "stop"), (FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")]
)
def test_finish_reasons_are_openais(reason: FinishReason, word: str) -> None:
    assert finish_word(reason, has_calls=False) == word
    assert finish_word(reason, has_calls=True) == ("length" if word == "length" else "tool_calls")


def test_reasoning_and_calls_stand_in_one_delta_and_a_call_is_opened_once() -> None:
    made = events()
    opened = [Part(PartKind.REASONING, "hm"), Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, '{"a"')]
    (first,) = parse(made.piece(piece(0, "", parts=opened), None, 1))
    (second,) = parse(made.piece(piece(0, "", parts=[Part(PartKind.ARGUMENTS, ":1}")]), None, 2))
    (call,) = choice_of(first)["delta"].pop("tool_calls")  # type: ignore[index]
    assert choice_of(first)["delta"] == {"reasoning_content": "hm"}  # type: ignore[index]
    assert call.pop("id") == call_id(plain_request("chat.completion"), 0, 0)
    assert call == {"index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    delta = {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}
    assert choice_of(second)["delta"] == delta  # type: ignore[index]


def test_usage_so_far_stands_in_each_event_for_those_who_asked() -> None:
    body = plain_request("chat.completion")
    made = SHAPE.events(structs.replace(body, input=with_form(body.input, AnswerForm(continuous_usage=True))))
    (event,) = parse(made.piece(piece(0, "x"), None, 3))
    assert event["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}  # type: ignore[index]


@given(st.text())
def test_text_is_json_in_one_line_for_every_client(text: str) -> None:
    data = text_json(text)
    assert json.loads(data) == text
    assert len(data.decode().splitlines()) == 1  # httpx and requests split at more than \n


def test_unusual_line_ends_reach_a_client_that_splits_lines() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x1cf"
    body = events().piece(piece(0, text), None, 1) + DONE
    lines = [line for line in httpx.Response(200, content=body).iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == text


def test_a_ping_is_one_line_and_no_event() -> None:
    assert PING == b": ping\n"


def test_an_error_ends_a_stream_with_an_event_and_done() -> None:
    data = error_events(DeadlineExceeded("too\nlate", stage="prefill"))
    assert data.endswith(b"\n\n" + DONE)
    (error,) = parse(data)
    assert error == {"error": {"message": "too\nlate", "type": "timeout_error", "param": None, "code": "queue_timeout"}}


NO, YES = {"x-should-retry": "false"}, {"x-should-retry": "true"}


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (InvalidRequest("x", param="n"), 400, NO),
        (ContextLengthExceeded("x", param="prompt"), 400, NO),
        (InvalidRequest("x", code="body_too_large"), 413, NO),
        (InvalidKey("x"), 401, NO | {"www-authenticate": "Bearer"}),
        (NotAllowed("x"), 403, NO),
        (RequestNotFound("x"), 404, NO),
        (IdempotencyConflict("x"), 409, NO),  # which the official clients would send again
        (QueueFull("x", retry_after_s=2.3), 503, YES | {"retry-after": "3", "retry-after-ms": "2300"}),
        (RateLimited("x", retry_after_s=0.0), 429, YES | {"retry-after": "1", "retry-after-ms": "1"}),
        (RateLimited("x", retry_after_s=60.0, never_fits=True), 429, NO),
        (KeyBusy("x", retry_after_s=1.0), 429, YES | {"retry-after": "1", "retry-after-ms": "1000"}),
        (DeadlineExceeded("x", stage="decode"), 504, YES),
        (RedisUnavailable("x"), 503, YES),
        (RequestFailed("x"), 500, NO),
        (EngineDied("x"), 500, YES),
        (BatonError("x"), 500, NO),
    ],
)
def test_errors_have_the_status_of_the_table(error: BatonError, status: int, headers: dict[str, str]) -> None:
    response = error_response(error)
    assert response.status_code == status
    told = ("retry-after", "retry-after-ms", "x-should-retry", "www-authenticate")
    assert {name: response.headers[name] for name in told if name in response.headers} == headers
    body = json.loads(response.body)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == error.code


def test_messages_are_bounded() -> None:
    assert len(error_json(InvalidRequest("x" * 100_000))) < 1000


@pytest.mark.parametrize(
    ("state", "status"), [("expired", 504), ("cancelled", 499), ("failed", 500), ("dead", 500), ("done", 500)]
)
def test_an_end_that_is_no_answer_is_an_error(state: str, status: int) -> None:
    error = error_of_end(Ended(state, "why", Usage(1, 0, 0), "prefill", Timeline()))
    assert row_of(error).status == status


def test_every_status_of_the_table_is_an_error() -> None:
    assert all(400 <= row.status < 600 for row in TABLE.values())
