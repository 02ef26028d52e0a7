"""Answers in a form: each way to ask for one, one at a time, and only where the engine serves it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import InvalidRequest
from pipeline.protocol import GuidedDecoding
from pipeline.surface.asks import served, wanted
from pipeline.surface.bodies import chat_body

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
PACKED = '{"type":"object","properties":{"a":{"type":"integer"}}}'
ANY_OBJECT = '{"type":"object"}'


def body(**fields: Any) -> Any:
    return chat_body(json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GuidedDecoding(json=ANY_OBJECT)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            GuidedDecoding(json=PACKED),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, GuidedDecoding(json=PACKED)),
        ({"structured_outputs": {"json_object": True}}, GuidedDecoding(json=ANY_OBJECT)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, GuidedDecoding(choice=["a", "b"])),
        ({"structured_outputs": {}}, None),
        ({"guided_json": PACKED}, GuidedDecoding(json=PACKED)),
        ({"guided_json": SCHEMA}, GuidedDecoding(json=PACKED)),
        ({"guided_regex": "a+"}, GuidedDecoding(regex="a+")),
        ({"guided_choice": ["a"]}, GuidedDecoding(choice=["a"])),
        ({"guided_grammar": "root ::= 'a'"}, GuidedDecoding(grammar="root ::= 'a'")),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, GuidedDecoding(regex="a+")),
    ],
)
def test_a_constraint_reaches_the_pipeline(fields: dict[str, Any], expected: GuidedDecoding | None) -> None:
    assert wanted(body(**fields)).sampling.guided_decoding == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"structured_outputs": {"json": "nothing"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_is_no_constraint_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wanted(body(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": SCHEMA},
        {"guided_grammar": 'start: "a"'},
    ],
)
def test_an_engine_that_cannot_is_named_with_the_field(fields: dict[str, Any]) -> None:
    asked = body(**fields)
    with pytest.raises(InvalidRequest, match="mock") as caught:
        served(asked, "mock")
    assert (caught.value.param, caught.value.code) == (next(iter(fields)), "unsupported_parameter")
    for engine in ("torch", "vllm"):
        assert served(asked, engine) == wanted(asked)
    served(body(response_format={"type": "text"}), "mock")


def test_a_grammar_that_is_none_is_named_where_its_engine_reads_it_so() -> None:
    asked = body(guided_grammar="root ::= 'a'")
    with pytest.raises(InvalidRequest, match="no answer can follow it") as caught:
        served(asked, "torch")
    assert caught.value.param == "guided_grammar"
    served(asked, "vllm")


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.1},
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.5},
        {"logit_bias": {"5": 1}},
    ],
)
def test_sampling_that_an_engine_cannot_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="mock") as caught:
        served(body(**fields), "mock")
    assert caught.value.param == next(iter(fields))
    served(body(**fields), "torch")
    served(body(min_p=0, presence_penalty=0, repetition_penalty=1.0, logit_bias={}), "mock")
