"""Bodies of responses: what is wrong is named by its path; items become a conversation, and are kept as they are listed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseItemList

from api.responses import page
from pipeline.builtin import BUILTIN_MODEL
from pipeline.errors import ContextLengthExceeded, InvalidRequest
from pipeline.preprocess import Preprocessor
from pipeline.surface.asks import conversation, form, served, wanted
from pipeline.surface.input_items import calls_in, kept_items, read_items
from pipeline.surface.responses_asks import answer_form, as_chat, echo, in_own_words, prepared
from pipeline.surface.responses_bodies import function_tools, response_body
from pipeline.tokenizer import Tokenizer
from tests.openai_types import strictly

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "42"}
IMAGE = {"type": "input_image", "image_url": "x"}
SCHEMA = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hi"} | fields).encode()


def read_all(data: bytes) -> None:
    body = response_body(data)
    assert body.input is not None
    as_chat(body, read_items(body.input))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "user", "content": [IMAGE]}]}, "input[1].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": 3}]}, "input[0].type"),
        ({"input": [{**CALL, "arguments": "["}]}, "input[0].arguments"),
        ({"input": [{**CALL, "name": "a b"}]}, "input[0].name"),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "!"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["x"]}, "include[0]"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata[...]"),
        ({"metadata": {"k": 1}}, "metadata[...]"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"truncation": "left"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        read_all(raw(**fields))
    assert wrong.value.param == param
    assert len(str(wrong.value)) < 400


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(("instructions", "tools", "tool_choice", "text", "metadata", "include", "temperature")),
        {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "unknown": 1},
        {"text": {"verbosity": "medium", "format": None}, "prompt_cache_retention": "24h", "service_tier": "fast"},
        {"stream": True, "stream_options": {"include_obfuscation": True}, "max_tool_calls": 3, "user": "u"},
    ],
)
def test_what_asks_for_nothing_is_welcome(fields: dict[str, Any]) -> None:
    read_all(raw(**fields))


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    body = response_body(raw(input=list(items), **fields))
    assert body.input is not None
    return list(conversation(as_chat(body, read_items(body.input))).messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["", False, 0, [], "image"])
def test_an_item_of_no_type_that_is_read_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        read_items([{"type": kind, "role": "user", "content": "hi"}])
    assert (wrong.value.param, wrong.value.code) == ("input[0].type", "unsupported_parameter")


def test_an_item_without_a_type_is_a_message() -> None:
    said = {"role": "user", "content": "hi"}
    assert messages(said) == messages({**said, "type": None}) == messages({**said, "type": "message"})


def test_items_of_an_assistant_in_a_row_are_one_message() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Well", "annotations": []}],
    }
    user = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert messages(user, thought, said, CALL, OUTPUT, said, said, instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "Well", "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "Well"},
        {"role": "assistant", "content": "Well"},
    ]
    assert messages({"role": "developer", "content": "x"})[0]["role"] == "system"
    assert messages({**thought, "content": None, "summary": [{"type": "summary_text", "text": "s"}]}) == [
        {"role": "assistant", "content": "", "reasoning_content": "s"}
    ]


def test_kept_items_are_of_the_types_and_read_again_the_same() -> None:
    given = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "Well"},
        {**CALL, "id": "fc_mine"},
        {**OUTPUT, "output": [{"type": "input_text", "text": "4"}, {"type": "input_text", "text": "2"}]},
    ]
    items = read_items(given)
    kept = kept_items(items, "r")
    listed = strictly(ResponseItemList, page(kept, newest_first=False, after=None, limit=10))
    assert [item.id for item in listed.data] == [item["id"] for item in kept]
    assert kept[3]["id"] == "fc_mine"
    assert kept_items(read_items(kept), "other") == kept
    assert calls_in(items) == {"1"}
    read_items([OUTPUT], calls_in(items))


def test_pages_follow_each_other_in_both_orders() -> None:
    items = [{"id": str(number)} for number in range(5)]
    first = page(items, newest_first=True, after=None, limit=2)
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["4", "3"], True)
    second = page(items, newest_first=True, after=first["last_id"], limit=3)
    assert ([one["id"] for one in second["data"]], second["has_more"]) == (["2", "1", "0"], False)
    assert page(items, newest_first=False, after="4", limit=3)["data"] == []
    with pytest.raises(InvalidRequest, match="after"):
        page(items, newest_first=False, after="x", limit=3)


def test_a_body_asks_for_what_the_chat_would() -> None:
    body = response_body(
        raw(
            tools=[TOOL, {"type": "function", "name": "g"}],
            tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            max_output_tokens=7, temperature=0.5, seed=3, top_logprobs=2, reasoning={"effort": "none"},
            text={"format": SCHEMA},
        )
    )  # fmt: skip
    chat = as_chat(body, read_items("hi"))
    asked = wanted(chat)
    assert (asked.stop.max_tokens, asked.sampling.temperature, asked.sampling.seed) == (7, 0.5, 3)
    assert (asked.output.logprobs, asked.sampling.guided_decoding is not None) == (2, True)
    assert [tool["function"]["name"] for tool in form(chat, "").tools] == ["g"]
    assert conversation(chat).variables == {"reasoning_effort": "none", "enable_thinking": False}
    told = echo(body, "default")
    assert told["text"] == {"format": SCHEMA}
    assert told["tool_choice"]["mode"] == "auto"
    assert (told["top_logprobs"], told["service_tier"], told["temperature"], told["top_p"]) == (2, "default", 0.5, 1.0)
    assert [tool.name for tool in function_tools(body)] == ["f", "g"]


def test_errors_have_the_names_of_responses() -> None:
    with pytest.raises(InvalidRequest, match=r"text\.format is not") as wrong, in_own_words():
        raise InvalidRequest("response_format is not served", param="response_format", code="unsupported_parameter")
    assert (wrong.value.param, wrong.value.code) == ("text.format", "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": SCHEMA}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
    ],
)
def test_what_the_engine_does_not_serve_is_named_as_it_was_asked_for(fields: dict[str, Any], param: str) -> None:
    chat = as_chat(response_body(raw(**fields)), read_items("hi"))
    with pytest.raises(InvalidRequest, match=f"{param} is not supported.*mock") as refused, in_own_words():
        served(chat, "mock")
    assert refused.value.param == param
    served(chat, "vllm")


def ready(truncation: str, *, words: int) -> list[int]:
    items: list[Any] = [{"role": "user", "content": f"number {number} " * words} for number in range(6)]
    body = response_body(raw(input=items, truncation=truncation, instructions="Be brief.", max_output_tokens=5))
    assert body.input is not None
    read = read_items(body.input)
    preprocessor = Preprocessor(
        Tokenizer.load(BUILTIN_MODEL), model="m", max_model_len=250, default_max_tokens=9, max_choices=1
    )
    chat = as_chat(body, read)
    told = answer_form(body, chat, kept_items(read, "r"), "default")
    return prepared(preprocessor, "r", chat, wanted(chat), told, truncates=truncation == "auto").token_ids


def test_truncation_leaves_out_the_oldest_messages() -> None:
    with pytest.raises(ContextLengthExceeded) as wrong:
        ready("disabled", words=20)
    assert wrong.value.param == "input"
    text = Tokenizer.load(BUILTIN_MODEL).decode(ready("auto", words=20), skip_special_tokens=False)
    assert "Be brief." in text
    assert "number 5" in text
    assert "number 0" not in text
    assert ready("auto", words=1) == ready("disabled", words=1)
    with pytest.raises(ContextLengthExceeded):
        ready("auto", words=300)
