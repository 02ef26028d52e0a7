"""Log probabilities: packed without loss, cut and joined with their tokens, told once with the text of their tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from pipeline.answer_form import AnswerForm, with_form
from pipeline.logprobs import (
    PromptLogprob,
    TokenLogprob,
    pack_logprobs,
    pack_prompt_logprobs,
    record_bytes,
    records_between,
    unpack_logprobs,
)
from pipeline.protocol import FinishReason, LLMEngineOutput, Log, OutputOptions, Request, TokenItem, pack_tokens
from pipeline.stream import TokenChunk
from pipeline.surface.event_ids import read_event_id
from pipeline.surface.transcript import NumberedTranscript, Transcript
from pipeline.tokenizer import Tokenizer
from tests import texts
from tests.system import request
from tests.unit.test_event_ids import SHAPE, blocks
from tests.unit.test_stream import LOGS, Store, open_stream
from workers.steps import merged


def asked(top: int | None, kind: str = "chat.completion", *, n: int = 1) -> Request:
    plain = request(3, n=n)
    with_logprobs = structs.replace(plain.input, output_options=OutputOptions(logprobs=top))
    return structs.replace(plain, kind=kind, input=with_logprobs)


def said(index: int, top: int) -> TokenLogprob:
    return TokenLogprob(-index / 4, [(1000 * index + rank, -rank / 8) for rank in range(top)])


def output(tokens: list[int], index: int = 0, top: int = 2, reason: FinishReason | None = None) -> LLMEngineOutput:
    rows = [said(index + offset, top) for offset in range(len(tokens))]
    return LLMEngineOutput(
        "r", 0, index, tokens, reason, [row.logprob for row in rows], None, [row.top for row in rows]
    )


@pytest.mark.parametrize("top", [0, 1, 20])
def test_records_are_of_one_size_and_say_what_was_packed(top: int) -> None:
    size = record_bytes(asked(top).input)
    data = pack_logprobs(output([7, 8, 9], 5, top))
    assert len(data) == 3 * size
    assert unpack_logprobs(data, size) == [said(5, top), said(6, top), said(7, top)]
    assert unpack_logprobs(records_between(data, 1, 5, size), size) == [said(6, top), said(7, top), None, None]
    assert pack_logprobs(LLMEngineOutput("r", 0, 0, [1])) == b""
    assert record_bytes(asked(None).input) == 0


def test_joined_outputs_keep_them_with_their_tokens() -> None:
    ended = LLMEngineOutput("r", 0, 3, [], FinishReason.EOS)
    [joined] = merged([output([7], 0), output([8, 9], 1), ended])
    assert pack_logprobs(joined) == pack_logprobs(output([7, 8, 9], 0))
    assert joined.finish_reason is FinishReason.EOS


async def test_a_reader_gets_each_record_once_however_frames_overlap_or_are_lost() -> None:
    store, size = Store(), record_bytes(asked(2).input)
    whole = pack_logprobs(output(LOGS[0]))
    stream = open_stream(store, request=asked(2, n=2))

    def item(start: int, stop: int) -> TokenItem:
        reason = "length" if stop == len(LOGS[0]) else ""
        return TokenItem("r", 0, start, pack_tokens(LOGS[0][start:stop]), reason, whole[start * size : stop * size])

    for start, stop in [(0, 1), (0, 3), (2, 3), (1, 6)]:
        stream.feed(item(start, stop))
    chunks = await anext(aiter(stream))
    assert b"".join(chunk.logprobs for chunk in chunks) == whole


def text_of(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)


def choices_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: "))["choices"][0] for _, event in blocks(data)]


@pytest.mark.parametrize("kind", ["chat.completion", "text_completion"])
@pytest.mark.parametrize("top", [0, 2])
def test_they_are_told_once_with_the_text_of_their_tokens_and_go_on_at_any_event(kind: str, top: int) -> None:
    tokenizer, what = texts.tokenizer("byte_level"), asked(top, kind)
    ids = tokenizer.encode("東京 is far", add_special_tokens=False)
    records = pack_logprobs(output(ids, 0, top))
    size = record_bytes(what.input)
    chunks = [
        TokenChunk(0, at, [token], None, records_between(records, at, at + 1, size)) for at, token in enumerate(ids)
    ]
    chunks[-1] = structs.replace(chunks[-1], finish_reason=FinishReason.LENGTH)
    whole = NumberedTranscript.from_start(tokenizer, what, SHAPE)
    events = blocks(whole.opening + whole.encode(chunks))
    plain = Transcript(tokenizer, what, SHAPE)
    together = TokenChunk(0, 0, ids, FinishReason.LENGTH, records)
    assert [data for _, data in events] == [data for _, data in blocks(plain.opening + plain.encode([together]))]
    told = [choice["logprobs"] for choice in choices_of(plain_of(events)) if "logprobs" in choice]
    tokens = [entry["token"] for part in told for entry in part["content"]] if what.kind == "chat.completion" else [
        token for part in told for token in part["tokens"]
    ]  # fmt: skip
    assert tokens == [text_of(tokenizer, token) for token in ids]
    if what.kind == "text_completion":
        offsets = [offset for part in told for offset in part["text_offset"]]
        whole_text = tokenizer.decode(ids)
        assert all(
            "\ufffd" in token or whole_text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True)
        )
        assert offsets[0] == 0
        assert sorted(offsets) == offsets
    log = Log(tokens=[ids], finished=[FinishReason.LENGTH])
    for seen, (name, _) in enumerate(events, start=1):
        place = read_event_id(name, what, log)
        rest, have = NumberedTranscript(tokenizer, what, SHAPE, place, log), place.tokens[0]
        tail = TokenChunk(0, have, ids[have:], FinishReason.LENGTH, records_between(records, have, len(ids), size))
        assert events[:seen] + blocks(rest.opening + rest.encode([tail])) == events


@pytest.mark.parametrize("kind", ["chat.completion", "text_completion"])
def test_those_of_a_prompt_are_told_first_and_once(kind: str) -> None:
    tokenizer = texts.tokenizer("byte_level")
    prompt, ids = (
        tokenizer.encode("東 so", add_special_tokens=False),
        tokenizer.encode(" far", add_special_tokens=False),
    )
    form = AnswerForm(echoes=kind == "text_completion", prompt_logprobs=1)
    base = asked(1, kind, n=2)
    options = OutputOptions(logprobs=1, prompt_logprobs=2)
    what = structs.replace(
        base, input=with_form(structs.replace(base.input, token_ids=prompt, output_options=options), form)
    )
    rows = [PromptLogprob(-token / 8, 3, [(65, -0.5), (66, -0.75)]) for token in range(1, len(prompt))]
    records, size = pack_prompt_logprobs(rows), record_bytes(what.input)
    own = pack_logprobs(output(ids, 0, 1))
    log = Log(tokens=[ids, []], finished=[FinishReason.LENGTH] * 2)  # the second choice ends without a token

    def chunks(start: int, *, has_prompt: bool) -> list[TokenChunk]:
        first = TokenChunk(0, start, ids[start:], FinishReason.LENGTH, records_between(own, start, len(ids), size))
        told = records if has_prompt else None
        return [structs.replace(first, prompt_logprobs=told), TokenChunk(1, 0, [], FinishReason.LENGTH)]

    whole = NumberedTranscript.from_start(tokenizer, what, SHAPE)
    events = blocks(whole.opening + whole.encode(chunks(0, has_prompt=True)))
    made = [json.loads(data.removeprefix(b"data: ")) for _, data in events]
    if kind == "chat.completion":
        told = [event["prompt_logprobs"] for event in made if "prompt_logprobs" in event]
        assert len(told) == 1
    else:
        told = [one["prompt_logprobs"] for event in made for one in event["choices"] if "prompt_logprobs" in one]
        assert len(told) == 2
        for choice in (0, 1):
            parts = [
                one["logprobs"]
                for event in made
                for one in event["choices"]
                if one["index"] == choice and "logprobs" in one
            ]
            tokens = [token for part in parts for token in part["token_logprobs"]]
            assert tokens[: len(prompt)] == [None, *(row.logprob for row in rows)]
            assert len(tokens) == len(prompt) + len(log.tokens[choice])
    expected = [None] + [{65: {"logprob": -0.5, "rank": 1, "decoded_token": text_of(tokenizer, 65)}} for _ in rows]
    for token, row, entry in zip(prompt[1:], rows, expected[1:], strict=True):
        assert entry is not None
        entry.setdefault(token, {"logprob": row.logprob, "rank": 3, "decoded_token": text_of(tokenizer, token)})
    assert [
        None if entry is None else {int(key): value for key, value in entry.items()} for entry in told[0]
    ] == expected
    for seen, (name, _) in enumerate(events, start=1):
        place = read_event_id(name, what, log)
        rest = NumberedTranscript(tokenizer, what, SHAPE, place, log)
        left = chunks(place.tokens[0], has_prompt=0 in place.tokens)
        if place.marks[0].phase in ("t", "e"):
            left[0] = structs.replace(left[0], token_ids=[], logprobs=b"")
        tail = [chunk for chunk, mark in zip(left, place.marks, strict=True) if mark.phase != "e"]
        if tail and 0 in place.tokens:
            tail[0] = structs.replace(tail[0], prompt_logprobs=records)
        assert events[:seen] + blocks(rest.opening + rest.encode(tail)) == events


def plain_of(events: list[tuple[str, bytes]]) -> bytes:
    return b"".join(data + b"\n\n" for _, data in events)


def test_what_redis_lost_and_what_cannot_come_is_told_so() -> None:
    tokenizer, what = texts.tokenizer("byte_level"), asked(1)
    given = LLMEngineOutput("r", 0, 0, [65], None, [-1.0], None, [[(66, float("-inf"))]])
    records = pack_logprobs(given) + b"\0" * record_bytes(what.input)
    data = Transcript(tokenizer, what, SHAPE).encode([TokenChunk(0, 0, [65, 67], FinishReason.LENGTH, records)])
    entries = [entry for choice in choices_of(data) if "logprobs" in choice for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == [-1.0, None]
    assert [[likely["logprob"] for likely in entry["top_logprobs"]] for entry in entries] == [[-9999.0], []]
