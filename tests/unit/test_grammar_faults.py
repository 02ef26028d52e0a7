"""What is no grammar is known before anything is queued; and JSON has one way to be written."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from pipeline.errors import InvalidRequest
from pipeline.grammars import LONGEST_FAULT, fault_of, grammar_of, refuse_unusable
from pipeline.protocol import GuidedDecoding

WRONG = [
    GuidedDecoding(json="{"),
    GuidedDecoding(json="[1]"),
    GuidedDecoding(json='{"type": "strin"}'),
    GuidedDecoding(json='{"properties": {"a": {"not": {}}}}'),
    GuidedDecoding(json='{"type": "string", "format": "nothing"}'),
    GuidedDecoding(regex="(a"),
    GuidedDecoding(regex="a{5,2}"),
    GuidedDecoding(grammar="root = nonsense"),
    GuidedDecoding(grammar="start: missing"),
    GuidedDecoding(grammar="root ::= missing"),
    GuidedDecoding(choice=[]),
    GuidedDecoding(),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_grammar_is_refused_with_the_reason(wrong: GuidedDecoding) -> None:
    with pytest.raises(InvalidRequest, match=r"guided_json: no answer can follow it: .+") as caught:
        refuse_unusable("torch", wrong, "guided_json")
    assert caught.value.param == "guided_json"
    assert len(str(caught.value)) < LONGEST_FAULT + 100
    refuse_unusable("vllm", wrong, "guided_json")  # which has grammars of its own


@pytest.mark.parametrize(
    "right",
    [
        GuidedDecoding(json="{}"),
        GuidedDecoding(json=json.dumps({"type": "object"})),
        GuidedDecoding(regex=r"\d+"),
        GuidedDecoding(choice=['"', "\\", "\n", "é"]),
        GuidedDecoding(grammar='start: "a" start | "b"'),
        GuidedDecoding(grammar='root ::= "a" root | "b"'),
    ],
)
def test_what_is_one_is_let_through_and_only_where_it_is_served(right: GuidedDecoding) -> None:
    assert fault_of(right) is None
    refuse_unusable("torch", right, "guided_json")
    with pytest.raises(InvalidRequest, match="mock") as caught:
        refuse_unusable("mock", right, "response_format")
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_parameter")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whitespace_flexible": True},
        {"whitespace_pattern": " *"},
        {"item_separator": " *, *", "key_separator": " *: *"},
    ],
)
def test_no_schema_lets_a_model_write_spaces_for_ever(options: dict[str, object]) -> None:
    """What a schema says to llguidance is what a client says."""
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "x-guidance": options}
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(GuidedDecoding(json=json.dumps(schema))), log_level=0)
    for spaced in (
        b' {"a":1,"b":[2]}',
        b'{ "a":1',
        b'{"a" :1',
        b'{"a": 1',
        b'{"a":1 ',
        b'{"a":1, "b"',
        b'{"a":1,"b":[ 2',
    ):
        assert matcher.deep_copy().try_consume_tokens(list(spaced)) < len(spaced), spaced
    whole = list(b'{"a":1,"b":[2]}')
    assert matcher.try_consume_tokens(whole) == len(whole) and matcher.is_accepting()


def test_no_schema_makes_its_unknown_keywords_ignored() -> None:
    schema = {"type": "object", "not": {"required": ["a"]}, "x-guidance": {"lenient": True}}
    assert "not" in (fault_of(GuidedDecoding(json=json.dumps(schema))) or "")
