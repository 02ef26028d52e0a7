"""Messages look as Anthropic's types say, and a stream, however its tokens came, is the whole message as the official client reads it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, MessageDeltaEvent, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from pydantic import TypeAdapter

from api.edge import dialect_of
from pipeline.answer_form import PLAIN, AnswerForm, with_form
from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import (
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    LowLaneFull,
    ModelNotFound,
    QueueFull,
    RedisUnavailable,
    RequestCancelled,
    RequestFailed,
)
from pipeline.protocol import FinishReason, Request, Timeline
from pipeline.stream import Ended, TokenChunk, Usage
from pipeline.surface.anthropic_errors import error_body, status_of, type_of
from pipeline.surface.collected import Collected
from pipeline.surface.shapes.anthropic import PING, AnthropicShape, parsed_input
from pipeline.surface.transcript import Transcript
from pipeline.tokenizer import Tokenizer
from tests.system import request

SHAPE = AnthropicShape()
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"b": {"type": "string"}}}}}
REASONS = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {"close": "<|end|>"},
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}  # fmt: skip
CALLS = (
    '<tool_call>{"name": "f", "arguments": {"b": "é"}}</tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>'
)
SAID = f"<think>hm\u2028</think>Well é.{CALLS}And."
FORCED = '{"b": "é and more", "list": [1, 2.5, null, {"deep": true}]}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("template") / "reasons.json"
    path.write_text(json.dumps(REASONS))
    return Tokenizer.load(BUILTIN_MODEL, response_template=str(path))


def asked(form: AnswerForm = PLAIN, stop: list[str] | None = None) -> Request:
    made = structs.replace(request(3, stop=stop), kind="message")
    return structs.replace(made, input=with_form(made.input, form))


def chunks(ids: list[int], cuts: list[int], reason: FinishReason = FinishReason.EOS) -> list[TokenChunk]:
    edges = sorted({0, len(ids), *(cut % len(ids) for cut in cuts)})
    made = [TokenChunk(0, start, ids[start:end], None) for start, end in itertools.pairwise(edges)]
    return [*made[:-1], structs.replace(made[-1], finish_reason=reason)]


def streamed(tokenizer: Tokenizer, what: Request, given: list[TokenChunk]) -> bytes:
    transcript = Transcript(tokenizer, what, SHAPE)
    return b"".join([transcript.opening, *(transcript.encode([one]) for one in given), transcript.end(ended(given))])


def whole(tokenizer: Tokenizer, what: Request, given: list[TokenChunk]) -> dict[str, Any]:
    collected = Collected(tokenizer, what)
    collected.push(given)
    return json.loads(json.dumps(SHAPE.whole(what, collected.all(), ended(given))))


def ended(given: list[TokenChunk]) -> Ended:
    count = sum(len(chunk.token_ids) for chunk in given)
    return Ended("done", "", Usage(3, count, 2), "decode", Timeline())


def parse(data: bytes) -> list[dict[str, Any]]:
    """The events; each has its name."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        name, _, value = block.partition("\ndata: ")
        assert len(block.splitlines()) == 2
        found.append(json.loads(value))
        assert name == f"event: {found[-1]['type']}"
    return found


def read_as_client(data: bytes) -> dict[str, Any]:
    """The message that the official client makes of a stream, with each event checked against its types."""
    snapshot, buffers = None, {}
    for event in parse(data):
        if event["type"] != "ping":
            snapshot = accumulate_event(
                event=EVENTS.validate_python(event), current_snapshot=snapshot, json_bufs=buffers
            )
    assert snapshot is not None
    return snapshot.to_dict()


def given_fields(message: dict[str, Any]) -> dict[str, Any]:
    """Without what the client adds."""
    return {name: value for name, value in message.items() if name not in ("stop_details",) or value is not None}


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=12), length=st.integers(1, 200))
def test_a_stream_is_the_whole_message_however_its_tokens_came(cuts: list[int], length: int) -> None:
    tokenizer = TOKENIZERS["reasons"]
    for choice, said in (("auto", SAID), ("named", FORCED)):
        ids, what = (
            tokenizer.encode(said, add_special_tokens=False)[:length],
            asked(AnswerForm(tools=[TOOL], tool_choice=choice)),
        )
        one_by_one = streamed(tokenizer, what, chunks(ids, list(range(len(ids)))))
        assert streamed(tokenizer, what, chunks(ids, cuts)) == one_by_one
        message = whole(tokenizer, what, chunks(ids, cuts))
        Message.model_validate(message, strict=True)
        assert given_fields(read_as_client(one_by_one)) == message


TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.fixture(autouse=True)
def _tokenizers(tokenizer: Tokenizer) -> None:
    TOKENIZERS["reasons"] = tokenizer


def test_the_order_of_events(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SAID, add_special_tokens=False)
    events = parse(streamed(tokenizer, asked(AnswerForm(tools=[TOOL])), chunks(ids, [])))
    said = [(event["type"], event.get("index"), event.get("delta", {}).get("type")) for event in events]
    runs = [one for at, one in enumerate(said) if at == 0 or one != said[at - 1]]

    def block(index: int, *deltas: str) -> list[Any]:
        inner = [("content_block_delta", index, delta) for delta in deltas]
        return [("content_block_start", index, None), *inner, ("content_block_stop", index, None)]

    assert runs == [
        ("message_start", None, None),
        ("ping", None, None),
        *block(0, "thinking_delta", "signature_delta"),
        *block(1, "text_delta"),
        *block(2, "input_json_delta"),
        *block(3, "input_json_delta"),
        *block(4, "text_delta"),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": len(ids),
    }
    MessageDeltaEvent.model_validate(events[-2], strict=True)


def test_the_whole_message_has_all_in_its_order(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SAID, add_special_tokens=False)
    what = asked(AnswerForm(tools=[TOOL], service_tier="default"))
    message = whole(tokenizer, what, chunks(ids, []))
    assert message["id"] == f"msg_{what.id}"
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert message["content"][0] == {"type": "thinking", "thinking": "hm\u2028", "signature": ""}
    assert [block.get("input") for block in message["content"][2:4]] == [{"b": "é"}, {}]
    assert len({block["id"] for block in message["content"][2:4]}) == 2
    assert message["usage"]["service_tier"] == "standard"


@pytest.mark.parametrize(
    ("stop", "reason", "expected"),
    [
        (None, FinishReason.EOS, ("end_turn", None)),
        (None, FinishReason.LENGTH, ("max_tokens", None)),
        (["zzz", "two"], FinishReason.STOP, ("stop_sequence", "two")),
    ],
)
def test_why_a_message_ended(tokenizer: Tokenizer, stop: Any, reason: FinishReason, expected: tuple[Any, Any]) -> None:
    ids, what = tokenizer.encode("one two three", add_special_tokens=False), asked(stop=stop)
    message = whole(tokenizer, what, chunks(ids, [], reason))
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert given_fields(read_as_client(streamed(tokenizer, what, chunks(ids, [], reason)))) == message
    assert [block["text"] for block in message["content"]] == ["one " if stop else "one two three"]


def test_an_answer_without_a_word_has_no_block(tokenizer: Tokenizer) -> None:
    what, only = asked(), [TokenChunk(0, 0, [], FinishReason.EOS)]
    assert whole(tokenizer, what, only)["content"] == []
    assert [event["type"] for event in parse(streamed(tokenizer, what, only))] == [
        "message_start", "ping", "message_delta", "message_stop"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("torn", "value"),
    [('{"a": 1}', {"a": 1}), ('{"a": 1, "b": "x', {"a": 1}), ("", {}), ("[1]", {}), ('{"a": nul', {}), ("}", {})],
)
def test_what_came_of_an_input_is_told(torn: str, value: dict[str, Any]) -> None:
    assert parsed_input(torn) == value


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (InvalidRequest("x", param="n"), 400, "invalid_request_error"),
        (ContextLengthExceeded("x"), 400, "invalid_request_error"),
        (ModelNotFound("x"), 404, "not_found_error"),
        (InvalidRequest("x", code="method_not_allowed"), 405, "invalid_request_error"),
        (InvalidRequest("x", code="body_too_large"), 413, "request_too_large"),
        (InvalidRequest("x", code="unsupported_media_type"), 415, "invalid_request_error"),
        (LowLaneFull("x", retry_after_s=1), 429, "rate_limit_error"),
        (RequestCancelled("x"), 499, "api_error"),
        (RequestFailed("x"), 500, "api_error"),
        (BatonError("x"), 500, "api_error"),
        (Draining("x", retry_after_s=1), 503, "api_error"),
        (RedisUnavailable("x"), 503, "api_error"),
        (DeadlineExceeded("x", stage="decode"), 504, "timeout_error"),
        (QueueFull("x", retry_after_s=1), 529, "overloaded_error"),
    ],
)
def test_errors_have_the_status_and_type_that_clients_know(error: BatonError, status: int, word: str) -> None:
    assert (status_of(error), type_of(error)) == (status, word)
    body = json.loads(error_body(error, "r1"))
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", word, "r1")
    if status != 413:  # documented, and not among the client's types
        ErrorResponse.model_validate(body)
    (event,) = parse(SHAPE.events(asked()).error(error))
    assert event == {"type": "error", "error": body["error"]}


def test_the_path_of_what_is_wrong_is_in_the_message() -> None:
    assert json.loads(error_body(InvalidRequest("x", param="n")))["error"]["message"] == "n: x"
    assert json.loads(error_body(InvalidRequest("n: x", param="n")))["error"]["message"] == "n: x"


@pytest.mark.parametrize(
    ("path", "is_anthropics"),
    [("/v1/messages", True), ("/v1/messages/count_tokens", True), ("/v1/messages/", True), ("/v1/messagesx", False), ("/v1/models", False)],
)  # fmt: skip
def test_errors_look_as_the_clients_of_a_path_know_them(path: str, is_anthropics: bool) -> None:
    assert (dialect_of(path) is dialect_of("/v1/messages")) is is_anthropics


def test_a_ping_is_an_event() -> None:
    assert parse(PING) == [{"type": "ping"}]
