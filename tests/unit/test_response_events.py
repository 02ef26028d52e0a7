"""Responses: events in OpenAI's order and types, the same bytes from any place and however the tokens were grouped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from openai.types.responses import Response

from pipeline.answer_form import with_form
from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import Draining
from pipeline.logprobs import pack_logprobs
from pipeline.protocol import FinishReason, LLMEngineOutput, OutputOptions, Request, Timeline
from pipeline.stream import Ended, TokenChunk, Usage
from pipeline.surface.errors import error_of_end
from pipeline.surface.response_transcript import ResponseTranscript
from pipeline.surface.responses_asks import answer_form, as_chat
from pipeline.surface.responses_bodies import response_body
from pipeline.surface.shapes.responses import ResponseShape
from pipeline.tokenizer import Tokenizer
from tests.openai_types import events_in, strictly
from tests.system import request

TOKENIZER = Tokenizer.load(BUILTIN_MODEL, response_template="qwen3")
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
TEXTS = {
    "text": "Grüße, 東京 👋🏽.",
    "reasoning": "<think>\nhm, 1 < 2\n</think>\n\nHi there.",
    "calls": f"<think>\nhm\n</think>\n\nHi.\n{CALL}\n{CALL}",
    "only a call": CALL,
    "nothing": "",
}
DONE = Ended("done", "", Usage(3, 7, 2), "decode", Timeline(ended=1_795_345_900_000_001))


def asked(*, background: bool = False, **fields: Any) -> Request:
    body = response_body(
        json.dumps({"model": "m", "input": "hi", "tools": [TOOL], "background": background, **fields}).encode()
    )
    made = structs.replace(request(3), kind="response")
    told = answer_form(body, as_chat(body, []), [], "default")
    return structs.replace(made, input=with_form(made.input, told), created_s=1_795_345_812)


def chunk(text: str, finish: FinishReason | None) -> TokenChunk:
    return TokenChunk(0, 0, TOKENIZER.encode(text, add_special_tokens=False), finish)


def parts_of(whole: TokenChunk, cuts: Sequence[int]) -> list[TokenChunk]:
    size = len(whole.token_ids)
    ends = sorted({0, size, *(cut % (size + 1) for cut in cuts)})
    pairs = list(itertools.pairwise(ends))
    if not pairs:
        return [whole]
    return [whole.part(a, b, whole.finish_reason if b == size else None) for a, b in pairs]


def streamed(what: Request, chunks: Sequence[TokenChunk], ended: Ended, after: int = -1) -> bytes:
    transcript = ResponseTranscript(TOKENIZER, what, ResponseShape(after))
    data = transcript.opening + b"".join(transcript.encode([one]) for one in chunks)
    return data + (transcript.end(ended) if ended.state == "done" else transcript.error(error_of_end(ended)))


def whole_of(what: Request, one: TokenChunk, ended: Ended | None) -> dict[str, Any]:
    transcript = ResponseTranscript.unread(TOKENIZER, what)
    transcript.push([one])
    return transcript.response(ended)


@pytest.mark.parametrize("name", sorted(TEXTS))
@pytest.mark.parametrize("finish", [FinishReason.EOS, FinishReason.LENGTH])
@pytest.mark.parametrize("background", [False, True])
def test_events_are_of_the_types_in_order_and_end_with_the_whole_response(
    name: str, finish: FinishReason, background: bool
) -> None:
    what, one = asked(background=background), chunk(TEXTS[name], finish)
    events = events_in(streamed(what, [one], DONE))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first = ["response.created", *(["response.queued"] if background else []), "response.in_progress"]
    assert [event["type"] for event in events[: len(first)]] == first
    is_cut = finish is FinishReason.LENGTH
    last = events[-1]
    assert last["type"] == ("response.incomplete" if is_cut else "response.completed")
    assert last["response"] == whole_of(what, one, DONE)
    response = strictly(Response, last["response"])
    assert (response.status, response.usage is not None) == ("incomplete" if is_cut else "completed", True)
    assert (response.completed_at is None) == is_cut
    check_items(events[len(first) : -1], last["response"]["output"], is_cut=is_cut)


def check_items(events: Sequence[dict[str, Any]], output: Sequence[dict[str, Any]], *, is_cut: bool) -> None:
    """One item after the other, each opened, told in pieces and closed as the response has it."""
    by_item: list[list[dict[str, Any]]] = [[] for _ in output]
    for event in events:
        by_item[event["output_index"]].append(event)
    assert [event for item in by_item for event in item] == list(events)
    for place, (item, told) in enumerate(zip(output, by_item, strict=True)):
        assert told[0]["item"]["id"] == item["id"]
        assert (told[0]["type"], told[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert told[-1]["item"] == item
        assert item["status"] == ("incomplete" if is_cut and place == len(output) - 1 else "completed")
        deltas = "".join(event["delta"] for event in told if "delta" in event)
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        kinds = [event["type"] for event in told]
        if item["type"] == "function_call":
            assert kinds[-2] == "response.function_call_arguments.done"
        else:
            assert (kinds[1], kinds[-2]) == ("response.content_part.added", "response.content_part.done")
            assert told[-2]["part"] == item["content"][0]


@pytest.mark.parametrize("name", sorted(TEXTS))
@pytest.mark.parametrize("state", ["done", "cancelled", "failed"])
def test_a_replay_is_byte_equal_at_every_starting_after(name: str, state: str) -> None:
    what, ended = asked(background=True), structs.replace(DONE, state=state)
    one = chunk(TEXTS[name], FinishReason.EOS if state == "done" else None)
    whole = streamed(what, [one], ended)
    events = whole.split(b"\n\n")[:-1]
    for after in range(-1, len(events) + 1):
        rest = streamed(what, [one], ended, after)
        assert rest == b"".join(event + b"\n\n" for event in events[after + 1 :])


def test_plain_text_is_told_as_text_among_other_parts_is() -> None:
    """Without a parser pieces of text take a shorter way."""
    plain = Tokenizer.load(BUILTIN_MODEL, response_template="none")
    what, one = asked(tools=None), chunk(TEXTS["text"], FinishReason.EOS)
    told: list[bytes] = []
    for tokenizer in (plain, TOKENIZER):
        transcript = ResponseTranscript(tokenizer, what, ResponseShape())
        told.append(transcript.opening + transcript.encode([one]) + transcript.end(DONE))
    assert told[0] == told[1]
    events_in(told[0])
    replayed = [ResponseTranscript(plain, what, ResponseShape(after)) for after in range(-1, 14)]
    rests = [one_of.opening + one_of.encode([one]) + one_of.end(DONE) for one_of in replayed]
    events = told[0].split(b"\n\n")[:-1]
    assert rests == [b"".join(event + b"\n\n" for event in events[count:]) for count in range(15)]


@pytest.mark.parametrize("name", sorted(TEXTS))
@given(cuts=st.lists(st.integers(0, 1000), max_size=40))
def test_grouping_of_tokens_changes_no_byte(name: str, cuts: list[int]) -> None:
    what, one = asked(), chunk(TEXTS[name], FinishReason.EOS)
    assert streamed(what, parts_of(one, cuts), DONE) == streamed(what, [one], DONE)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ERROR])
@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\nWell 👋", CALL, "Well <tool_call"])
def test_an_end_that_comes_behind_the_last_token_changes_no_byte(reason: FinishReason, text: str) -> None:
    """From the log it comes with the last token; here that leaves half a character or half a tag behind."""
    what, ended = asked(), structs.replace(DONE, state="done" if reason is FinishReason.LENGTH else "failed")
    ids = TOKENIZER.encode(text, add_special_tokens=False)[:-1]
    live = [TokenChunk(0, 0, ids, None), TokenChunk(0, len(ids), [], reason)]
    assert streamed(what, live, ended) == streamed(what, [TokenChunk(0, 0, ids, reason)], ended)


def test_items_are_what_the_answer_says() -> None:
    (thought, said, *calls) = whole_of(asked(), chunk(TEXTS["calls"], FinishReason.EOS), DONE)["output"]
    assert (thought["type"], thought["content"][0]["text"].strip()) == ("reasoning", "hm")
    assert (said["type"], said["content"][0]["text"].strip()) == ("message", "Hi.")
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("f", {"a": "é"})] * 2
    assert len({one["id"] for one in (thought, said, *calls)}) == 4
    assert len({call["call_id"] for call in calls}) == 2


def test_reasoning_is_counted_and_nothing_else() -> None:
    usage = whole_of(asked(), chunk(TEXTS["reasoning"], FinishReason.EOS), DONE)["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < len(chunk(TEXTS["reasoning"], None).token_ids)
    usage = whole_of(asked(), chunk(TEXTS["text"], FinishReason.EOS), DONE)["usage"]
    assert usage == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


def test_a_response_without_a_word_has_an_empty_message() -> None:
    (item,) = whole_of(asked(), chunk("", FinishReason.EOS), DONE)["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("failed", "failed", "server_error"), ("expired", "failed", "server_error"), ("dead", "failed", "server_error"),
     ("cancelled", "cancelled", None)],
)  # fmt: skip
def test_what_failed_says_so_and_keeps_what_it_said(state: str, status: str, code: str | None) -> None:
    ended, one = structs.replace(DONE, state=state, reason="why"), chunk("Well", None)
    what = asked()
    last = events_in(streamed(what, [one], ended))[-1]
    assert last["type"] == "response.failed"
    assert last["response"] == whole_of(what, one, ended)
    response = strictly(Response, last["response"])
    assert (response.status, response.error and response.error.code) == (status, code)
    assert (response.output_text, response.output[0].status) == ("Well", "incomplete")  # type: ignore[union-attr]


@pytest.mark.parametrize("after", [-1, 1, 4, 99])
def test_who_goes_on_behind_the_error_of_a_stream_that_ended_alone_misses_nothing(after: int) -> None:
    """Its number is that of the last event which the reader has: the next one is of the response."""
    text = TEXTS["reasoning"]
    what, first, last = asked(), chunk(text[:12], None), chunk(text[12:], FinishReason.EOS)
    whole = events_in(streamed(what, [first, last], DONE))
    transcript = ResponseTranscript(TOKENIZER, what, ResponseShape(after))
    seen = events_in(transcript.opening + transcript.encode([first]))
    (error,) = events_in(transcript.error(Draining("leaving", retry_after_s=1.0)))
    assert (error["type"], error["code"], error["message"]) == ("error", "draining", "leaving")
    rest = events_in(streamed(what, [first, last], DONE, error["sequence_number"]))
    assert whole[: after + 1] + seen + rest == whole


@pytest.mark.parametrize(("text", "status"), [('{"a":"x', "incomplete"), ('{"a":"x"}', "completed")])
def test_a_call_that_a_stop_token_ends_is_incomplete(text: str, status: str) -> None:
    what, one = asked(tool_choice={"type": "function", "name": "f"}), chunk(text, FinishReason.STOP)
    last = events_in(streamed(what, [one], DONE))[-1]
    assert last["response"] == whole_of(what, one, DONE)
    (call,) = strictly(Response, last["response"]).output
    assert (call.arguments, call.status) == (text, status)  # type: ignore[union-attr]


@pytest.mark.parametrize(("background", "status"), [(True, "queued"), (False, "in_progress")])
def test_what_nobody_has_begun_waits(background: bool, status: str) -> None:
    what = asked(background=background)
    assert whole_of(what, TokenChunk(0, 0, [], None), None)["status"] == status
    begun = strictly(Response, whole_of(what, chunk("Well", None), None))
    assert (begun.status, begun.output_text, begun.usage) == ("in_progress", "Well", None)


def test_log_probabilities_stand_beside_the_text_they_are_of() -> None:
    what = asked(include=["message.output_text.logprobs"], top_logprobs=1)
    what = structs.replace(what, input=structs.replace(what.input, output_options=OutputOptions(logprobs=1)))
    ids = TOKENIZER.encode("<think>\nhm\n</think>\n\nHi é.", add_special_tokens=False)
    said = LLMEngineOutput("r", 0, 0, ids, None, [-0.5] * len(ids), None, [[(one, -0.5)] for one in ids])
    one = TokenChunk(0, 0, ids, FinishReason.EOS, pack_logprobs(said))
    events = events_in(streamed(what, [one], DONE))
    assert streamed(what, parts_of(one, range(len(ids))), DONE) == streamed(what, [one], DONE)
    message = strictly(Response, events[-1]["response"]).output[1]
    (part,) = message.content  # type: ignore[union-attr,misc]
    told = [entry for event in events if event["type"].endswith("text.delta") for entry in event.get("logprobs", [])]
    assert [entry["token"] for entry in told] == [entry.token for entry in part.logprobs]  # type: ignore[union-attr]
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text == "Hi é."  # type: ignore[union-attr]
    assert all(entry["top_logprobs"] for entry in told)
