"""Ids of events: read strictly, and refused with what is wrong when no event of the request can have had them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pipeline.answer_form import AnswerForm, with_form
from pipeline.errors import InvalidRequest
from pipeline.protocol import FinishReason, Log, Request, Timeline
from pipeline.stream import Ended, TokenChunk, Usage
from pipeline.surface.event_ids import Mark, Place, read_event_id
from pipeline.surface.shapes.openai import OpenAIShape
from pipeline.surface.transcript import NumberedTranscript, Transcript
from tests import texts
from tests.system import request

SHAPE = OpenAIShape("reasoning_content")
LOG = Log(tokens=[[5, 6, 7], [8], []], finished=[FinishReason.LENGTH, None, None])


def asked(
    kind: str = "chat.completion",
    n: int = 3,
    *,
    usage: bool = False,
    stop: list[str] | None = None,
    tells: bool = False,
) -> Request:
    made = structs.replace(request(3, n=n, stop=stop), kind=kind, include_usage=usage)
    return structs.replace(made, input=with_form(made.input, AnswerForm(return_token_ids=tells)))


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("0.o.o", [(0, ""), (0, "o"), (0, "o")]),
        ("0.0.0", [(0, ""), (0, ""), (0, "")]),
        ("3.1.0", [(3, ""), (1, ""), (0, "")]),
        ("3t.1.0", [(3, "t"), (1, ""), (0, "")]),
        ("3e.0.0", [(3, "e"), (0, ""), (0, "")]),
    ],
)
def test_an_id_names_a_place(text: str, marks: list[tuple[int, str]]) -> None:
    place = read_event_id(text, asked(), LOG)
    assert place == Place([Mark(*mark) for mark in marks])
    assert ".".join(map(str, place.marks)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not an id"),
        ("x", "not an id"),
        ("3.1.0 ", "not an id"),
        ("3.1.0-u-u", "not an id"),
        ("٣.1.0", "not an id"),
        ("3.1", "2 part"),
        ("3.1.0.0", "4 part"),
        ("3..0", "''"),
        ("03.1.0", "'03'"),
        ("3et.1.0", "'3et'"),
        ("e.1.0", "'e'"),
        ("9999999999.1.0", "9999999999"),
        ("4.1.0", "choice 0 has 3 tokens"),
        ("3.1.1", "choice 2 has 0 tokens"),
        ("2e.1.0", "choice 0 did not end"),
        ("3.1t.0", "choice 1 did not end"),
        ("o.1.0", "opened"),
        ("3.o.o", "opened"),
        ("0.o.0", "opened"),
        ("3e.1.0-u", "usage"),
    ],
)
def test_an_id_that_no_event_had_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        read_event_id(text, asked(usage=True), LOG)
    assert caught.value.param == "Last-Event-ID"


@given(st.text(alphabet="0123456789teo.-u ", max_size=40))
def test_whatever_comes_is_a_place_or_a_refusal(text: str) -> None:
    try:
        place = read_event_id(text, asked(usage=True), LOG)
    except InvalidRequest:
        return
    assert ".".join(map(str, place.marks)) == text.removesuffix("-u")


def test_a_completion_has_no_openings_and_usage_comes_only_where_it_was_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="'o'"):
        read_event_id("o.o.o", asked("text_completion"), LOG)
    done = Log(tokens=[[5]], finished=[FinishReason.EOS])
    assert read_event_id("1e-u", asked(n=1, usage=True), done).has_usage
    with pytest.raises(InvalidRequest, match="usage"):
        read_event_id("1e-u", asked(n=1), done)
    failed = Log(tokens=[[5]], finished=[FinishReason.ERROR])
    with pytest.raises(InvalidRequest, match="came to no end"):
        read_event_id("1e", asked(n=1), failed)


@pytest.mark.parametrize("reason", list(FinishReason))
@pytest.mark.parametrize("is_late", [False, True], ids=["with its token", "alone"])
@pytest.mark.parametrize("tells", [False, True], ids=["text", "tokens too"])
def test_however_a_choice_ends_and_is_cut_its_text_is_the_same(
    reason: FinishReason, is_late: bool, tells: bool
) -> None:
    """The reason may come with the last token or behind it; held-back text comes with it."""
    tokenizer = texts.tokenizer("byte_level")
    what = asked("text_completion" if tells else "chat.completion", n=1, stop=["ENDING"], tells=tells)
    ids = tokenizer.encode("東京 is far EN", add_special_tokens=False)
    chunks = [TokenChunk(0, index, [token], None) for index, token in enumerate(ids)]
    if is_late:
        chunks.append(TokenChunk(0, len(ids), [], reason))
    else:
        chunks[-1] = structs.replace(chunks[-1], finish_reason=reason)
    whole = NumberedTranscript.from_start(tokenizer, what, SHAPE)
    events = blocks(whole.opening + whole.encode(chunks))
    plain = Transcript(tokenizer, what, SHAPE)
    assert [data for _, data in events] == [data for _, data in blocks(plain.opening + plain.encode(chunks))]
    log = Log(tokens=[ids], finished=[reason])
    for seen, (name, _) in enumerate(events, start=1):
        place = read_event_id(name, what, log)
        rest = NumberedTranscript(tokenizer, what, SHAPE, place, log)
        have = place.tokens[0]
        tail = rest.opening + rest.encode([TokenChunk(0, have, ids[have:], None if is_late else reason)])
        tail += rest.encode([TokenChunk(0, len(ids), [], reason)]) if is_late else b""
        assert events[:seen] + blocks(tail) == events


def test_the_usage_is_told_once_and_has_an_id() -> None:
    tokenizer, what = texts.tokenizer("byte_level"), asked(n=1, usage=True)
    log = Log(tokens=[[5]], finished=[FinishReason.LENGTH])
    ended = Ended("done", "", Usage(1, 1, 0), "decode", Timeline())
    for name, is_told in (("1e", True), ("1e-u", False)):
        transcript = NumberedTranscript(tokenizer, what, SHAPE, read_event_id(name, what, log), log)
        transcript.encode([TokenChunk(0, 1, [], FinishReason.LENGTH)])
        assert [found for found, _ in blocks(transcript.end(ended))][:-1] == (["1e-u"] if is_told else [])


def blocks(data: bytes) -> list[tuple[str, bytes]]:
    """Ids and data of events."""
    found = []
    for block in data.split(b"\n\n")[:-1]:
        head, _, last = block.rpartition(b"\n")
        found.append((head.removeprefix(b"id: ").decode(), last))
    return found
