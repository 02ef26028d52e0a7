"""Answers are read the same however their text was grouped: by each of Baton's templates, as calls of a grammar, and from any event on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pipeline.answer_form import AnswerForm, with_form
from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import ConfigError
from pipeline.grammars import fault_of
from pipeline.parsers.forced import NamedCall, RequiredCalls, arguments_schema, calls_schema
from pipeline.parsers.templated import ResponseFormat, TemplatedParser
from pipeline.parsing import Parser, Part, PartKind
from pipeline.protocol import FinishReason, GuidedDecoding, Log
from pipeline.stream import TokenChunk
from pipeline.surface.collected import Collected
from pipeline.surface.event_ids import read_event_id
from pipeline.surface.transcript import NumberedTranscript, Transcript
from pipeline.tokenizer import RESPONSE_TEMPLATES, Tokenizer, response_format
from tests.system import request
from tests.unit.test_event_ids import SHAPE, blocks

PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "string"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"properties": PROPERTIES}}}
START = "<|im_start|>assistant\n"
HERMES_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

# template -> end of the prompt, answer, reasoning, content, arguments of the calls
ANSWERS: dict[str, tuple[str, str, str, str, list[dict[str, Any]]]] = {
    "hermes": (START, f"Hi.\n{HERMES_CALL}\n{HERMES_CALL}<|im_end|>", "", "Hi.", [{"a": 1}, {"a": 1}]),
    "qwen3": (START, f"<think>\nhm, 1 < 2\n</think>\n\nHi.\n{HERMES_CALL}", "hm, 1 < 2", "Hi.", [{"a": 1}]),
    "qwen3_coder": (
        START + "<think>\n",
        "hm\n</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n3\ny\n</parameter>\n"
        "</function>\n</tool_call>",
        "hm",
        "",
        [{"a": 12, "b": "3\ny"}],
    ),
    "deepseek_r1": ("<\uff5cAssistant\uff5c><think>\n", "well\n</think>\n\nYes", "well", "Yes", []),
    "mistral": (
        "[INST] x [/INST]",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"b": "]"}}]',
        "",
        "",
        [{"a": 1}, {"b": "]"}],
    ),
    "gpt_oss": (
        "<|start|>assistant",
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|>',
        "think",
        "",
        [{"a": 1}],
    ),
}


def read(parser: Parser, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and name and arguments of each call; each call opened once and before its arguments."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    calls: list[tuple[str, str]] = []
    for part in parts:
        if part.kind is PartKind.CALL:
            assert part.call == len(calls)
            calls.append((part.text, ""))
        elif part.kind is PartKind.ARGUMENTS:
            name, arguments = calls[part.call]
            calls[part.call] = (name, arguments + part.text)
    return said(parts, PartKind.REASONING), said(parts, PartKind.CONTENT), calls


def said(parts: Sequence[Part], kind: PartKind) -> str:
    return "".join(part.text for part in parts if part.kind is kind)


def template(name: str) -> ResponseFormat:
    found = response_format(name, None)
    assert found is not None
    return found


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    ends = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def test_each_template_of_batons_has_an_answer_here() -> None:
    assert {path.stem for path in RESPONSE_TEMPLATES.glob("*.json")} == set(ANSWERS)


@pytest.mark.parametrize("name", sorted(ANSWERS))
@given(cuts=st.lists(st.integers(0, 1000), max_size=40))
def test_an_answer_is_read_the_same_however_it_was_grouped(name: str, cuts: list[int]) -> None:
    prefix, text, reasoning, content, arguments = ANSWERS[name]
    found = read(TemplatedParser(template(name), prefix, [TOOL], reasons=True), pieces_of(text, cuts))
    assert found[:2] == (reasoning, content)
    assert [(called, json.loads(given)) for called, given in found[2]] == [("f", one) for one in arguments]


def test_without_tools_a_call_is_content_as_it_stands_and_reasoning_may_be_left_out() -> None:
    prefix, text, reasoning, _, _ = ANSWERS["qwen3"]
    found = read(TemplatedParser(template("qwen3"), prefix, [], reasons=True), [text])
    assert found == (reasoning, f"Hi.\n{HERMES_CALL}", [])
    assert read(TemplatedParser(template("qwen3"), prefix, [], reasons=False), [text])[0] == ""


@pytest.mark.parametrize(
    "body", ['{"name": "f", "arguments": {"a": 1}', "[]", '{"name": "g", "arguments": {}}', '{"name": "f"}', "no JSON", '{"name": 3}']
)  # fmt: skip
def test_a_call_that_cannot_be_read_is_content_and_what_follows_is_read(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>{HERMES_CALL} bye"
    _, content, calls = read(TemplatedParser(template("hermes"), START, [TOOL], reasons=True), list(text))
    assert content == body + " bye"
    assert calls == [("f", '{"a": 1}')]


def test_a_call_that_the_end_cuts_is_given_out_as_far_as_it_is_one() -> None:
    whole = read(
        TemplatedParser(template("hermes"), START, [TOOL], reasons=True), [HERMES_CALL.removesuffix("</tool_call>")]
    )
    assert whole[2] == [("f", '{"a": 1}')]


@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "g-1"]), st.dictionaries(st.text(), st.text() | st.dictionaries(st.text(), st.none())))),
    cuts=st.lists(st.integers(0, 1000), max_size=40),
    indent=st.sampled_from([None, 1]),
)  # fmt: skip
def test_required_calls_are_found_as_they_come(calls: Any, cuts: list[int], indent: int | None) -> None:
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)
    _, content, found = read(RequiredCalls(), pieces_of(text, cuts))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_arguments_are_given_out_before_they_are_over() -> None:
    parser = RequiredCalls()
    assert parser.push('[{"name":"f","argu') == []
    assert parser.push('ments":{"a":"x') == [Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, '{"a":"x')]
    assert NamedCall("f").push("{") == [Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, "{")]


def test_the_grammar_of_calls_takes_arguments_as_objects() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    assert arguments_schema(other) == {"type": "object"}
    schema = calls_schema([TOOL, other], parallel=False)
    assert (schema["minItems"], schema["maxItems"], len(schema["items"]["anyOf"])) == (1, 1, 2)


def test_the_grammar_of_calls_follows_references_within_arguments() -> None:
    """As pydantic writes models within models, and both tools name theirs alike; what only looks like a reference stays."""
    days = [{"type": "integer", "enum": [1, 2]}, {"const": {"$ref": "#/$defs/Day"}}]
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"f{index}",
                "parameters": {
                    "properties": {"$ref": {"$ref": "#/$defs/Day"}, "more": {"type": "array", "items": {"$ref": "#"}}},
                    "required": ["$ref"],
                    "additionalProperties": False,
                    "$defs": {"Day": day},
                },
            },
        }
        for index, day in enumerate(days)
    ]
    schema = calls_schema(tools, parallel=True)
    assert fault_of(GuidedDecoding(json=json.dumps(schema))) is None
    assert schema["$defs"]["1"]["$defs"]["Day"] == days[1]
    follows = jsonschema_rs.validator_for(schema).is_valid
    inner: list[dict[str, Any]] = [{"$ref": 1, "more": [{"$ref": 2}]}, {"$ref": {"$ref": "#/$defs/Day"}}]
    assert follows([{"name": f"f{index}", "arguments": arguments} for index, arguments in enumerate(inner)])
    assert not follows([{"name": "f0", "arguments": {"$ref": 1, "more": [inner[1]]}}])


@pytest.mark.parametrize("said", ["nowhere", "./nothing.json"])
def test_a_template_that_is_not_there_is_named_with_those_that_are(said: str) -> None:
    with pytest.raises(ConfigError, match="hermes, mistral"):
        response_format(said, None)


def test_a_template_is_a_file_or_the_models_own_or_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"start_anchor": "A", "fields": {"content": {}, "thinking": {"open": "(", "close": ")"}}})
    )
    found = response_format(str(path), None)
    assert found is not None and found.has_reasoning and not found.has_calls
    path.write_text('{"fields": {}}')
    with pytest.raises(ConfigError, match="no response template"):
        response_format(str(path), None)
    assert response_format("none", {"fields": {}}) is None


@pytest.mark.parametrize("finish", [FinishReason.EOS, FinishReason.LENGTH])
def test_a_stream_with_calls_goes_on_at_any_event(finish: FinishReason) -> None:
    tokenizer = Tokenizer.load(BUILTIN_MODEL)
    made = structs.replace(request(3), kind="chat.completion")
    what = structs.replace(made, input=with_form(made.input, AnswerForm(tools=[TOOL])))
    text = 'Well. <tool_call>{"name": "f", "arguments": {"b": "é"}}</tool_call> <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks = [TokenChunk(0, at, [token], None) for at, token in enumerate(ids)]
    chunks[-1] = structs.replace(chunks[-1], finish_reason=finish)
    whole = NumberedTranscript.from_start(tokenizer, what, SHAPE)
    events = blocks(whole.opening + whole.encode(chunks))
    plain = Transcript(tokenizer, what, SHAPE)
    together = plain.opening + plain.encode([TokenChunk(0, 0, ids, finish)])
    assert [data for _, data in events] == [data for _, data in blocks(together)]
    word = "tool_calls" if finish is FinishReason.EOS else "length"
    assert f'"finish_reason":"{word}"'.encode() in events[-1][1]
    log = Log(tokens=[ids], finished=[finish])
    for seen, (name, _) in enumerate(events, start=1):
        place = read_event_id(name, what, log)
        rest = NumberedTranscript(tokenizer, what, SHAPE, place, log)
        have = place.tokens[0]
        assert events[:seen] + blocks(rest.opening + rest.encode([TokenChunk(0, have, ids[have:], finish)])) == events


FORCED = {
    "named": ('{"b": "one END {"}', '{"b": "one '),
    "required": ('[{"name":"f","arguments":{"b": "one END {"}}]', '{"b": "one '),
}


@pytest.mark.parametrize("choice", sorted(FORCED))
@pytest.mark.parametrize(
    ("stop", "finish", "word"),
    [
        (None, FinishReason.EOS, "tool_calls"),
        (None, FinishReason.STOP, "tool_calls"),
        (["END"], None, "stop"),
        (["}"], None, "stop"),
        (None, FinishReason.LENGTH, "length"),
    ],
)
def test_an_answer_that_ends_within_a_forced_call_does_not_say_that_it_is_one(
    choice: str, stop: list[str] | None, finish: FinishReason | None, word: str
) -> None:
    """Whole and streamed alike."""
    text, torn = FORCED[choice]
    if finish is FinishReason.LENGTH:
        text = text[: text.index("END")]
    tokenizer = Tokenizer.load(BUILTIN_MODEL)
    made = structs.replace(request(3, stop=stop), kind="chat.completion")
    what = structs.replace(made, input=with_form(made.input, AnswerForm(tools=[TOOL], tool_choice=choice)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    collected = Collected(tokenizer, what)
    collected.push([TokenChunk(0, 0, ids, finish)])
    (said,) = collected.all()
    is_torn = said.calls[0].arguments == torn
    assert (said.finish, is_torn) == (word, word == "length" or stop == ["END"])
    streamed = Transcript(tokenizer, what, SHAPE).encode([TokenChunk(0, 0, ids, finish)])
    events = [json.loads(event.removeprefix(b"data: ")) for event in streamed.split(b"\n\n") if event]
    assert events[-1]["choices"][0]["finish_reason"] == word
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == said.calls[0].arguments
