"""Anthropic's bodies: what is wrong is named by its path, what can be served becomes the chat that it is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pipeline.errors import InvalidRequest
from pipeline.surface.anthropic_bodies import SCHEMA_FIELD, count_body, message_body
from pipeline.surface.anthropic_chats import chat_of
from pipeline.surface.anthropic_errors import error_body, named
from pipeline.surface.asks import conversation, form, served, wanted
from pipeline.surface.bodies import chat_body, digest

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {
    "name": "f",
    "description": "does",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
OTHER = {"type": "custom", "name": "g", "input_schema": {"type": "object"}}
AS_CHAT = {"type": "function", "function": {"name": "f", "description": "does", "parameters": TOOL["input_schema"]}}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": ""}
FORMAT = {"format": {"type": "json_schema", "schema": {"type": "object"}}}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 9, "messages": HELLO} | fields).encode()


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "cache_control": {"type": "ephemeral"}}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content} | fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [user({"type": "image", "source": {}})]}, "messages[0].content[0].type"),
        ({"messages": [user(text("x"), {"type": "document"})]}, "messages[0].content[1].type"),
        ({"messages": [user({"type": "server_tool_use"})]}, "messages[0].content[0].type"),
        ({"messages": [user(CALL)]}, "messages[0].content[0].type"),
        ({"messages": [assistant(result("x"))]}, "messages[0].content[0].type"),
        ({"messages": [user(result("x"))]}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": [*HELLO, assistant(CALL), user(result([{"type": "image"}]))]},
            "messages[2].content[0].content[0].type",
        ),
        ({"messages": [*HELLO, assistant(CALL)]}, "messages"),
        ({"messages": [*HELLO, assistant(CALL | {"input": []})]}, "messages[1].content[0].input"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}, "output_config": FORMAT}, "output_config.format"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 3}, "temperature"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        chat_of(message_body(body(**fields)))
    assert raised.value.param == param
    told = json.loads(error_body(raised.value))["error"]["message"]
    assert told.count(param) == 1
    assert not re.search(r"\w\[\d", told.replace(param, "")), "the path, or its beginning, is told once"


@pytest.mark.parametrize(
    ("param", "message", "told"),
    [
        ("a[0].b", "a[0]: no", "a[0].b: no"),
        ("a[0].b", "a: no: never", "a[0].b: no: never"),
        ("a[0].b", "a[0].b: no", "a[0].b: no"),
        ("ab", "a: no", "ab: a: no"),
        ("a[0]", "wrong", "a[0]: wrong"),
    ],
)
def test_a_path_is_named_once_and_whole(param: str, message: str, told: str) -> None:
    assert named(param, message) == told


@pytest.mark.parametrize("missing", ["model", "max_tokens", "messages"])
def test_what_must_be_there_is_named(missing: str) -> None:
    given = json.loads(body())
    del given[missing]
    with pytest.raises(InvalidRequest, match=f"{missing}: required field is missing"):
        message_body(json.dumps(given).encode())


def test_the_same_request_is_the_same_chat() -> None:
    sent = body(
        system=[text("Be"), text("kind")],
        messages=[
            *HELLO,
            assistant(THOUGHT, {"type": "redacted_thinking", "data": "x"}, text("ok"), CALL),
            user(result([text("one"), text("two")]), text("and")),
            user(text("more")),
        ],
        tools=[TOOL, OTHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        metadata={"user_id": "u"},
        service_tier="standard_only",
    )  # fmt: skip
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    as_chat = {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "ok"}], "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "content": "one\ntwo", "name": "f", "tool_call_id": "t1"},
            {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "more"}]},
        ],
        "tools": [AS_CHAT, {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "service_tier": "default",
    }  # fmt: skip
    chat = chat_of(message_body(sent))
    other = chat_body(json.dumps(as_chat).encode())
    assert digest(chat) == digest(other)
    assert (conversation(chat), wanted(chat), form(chat, "")) == (conversation(other), wanted(other), form(other, ""))


def test_neighbouring_turns_of_an_assistant_are_one() -> None:
    turns = [assistant(THOUGHT, text("one")), {"role": "assistant", "content": "two"}, assistant(THOUGHT, CALL)]
    apart = body(messages=[*HELLO, *turns, user(result("x"))])
    together = body(messages=[*HELLO, assistant(THOUGHT, THOUGHT, text("one"), text("two"), CALL), user(result("x"))])
    assert chat_of(message_body(apart)) == chat_of(message_body(together))


@pytest.mark.parametrize(
    ("choice", "mode"), [("auto", "auto"), ("none", "none"), ("any", "required"), ("tool", "named")]
)
def test_a_choice_of_tools_is_that_of_chats(choice: str, mode: str) -> None:
    chosen = {"type": choice} | ({"name": "f"} if choice == "tool" else {})
    asked = form(chat_of(message_body(body(tools=[TOOL, OTHER], tool_choice=chosen))), "")
    assert asked.tool_choice == mode
    assert [tool["function"]["name"] for tool in asked.tools] == (["f"] if choice == "tool" else ["f", "g"])


@pytest.mark.parametrize(
    ("thinking", "variables", "is_shown"),
    [
        (None, {}, True),
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True, "thinking_budget": 1024}, True),
        ({"type": "adaptive", "display": "omitted"}, {"enable_thinking": True}, False),
        ({"type": "disabled"}, {"enable_thinking": False}, False),
    ],
)
def test_thinking_is_told_to_the_template(thinking: Any, variables: dict[str, Any], is_shown: bool) -> None:
    chat = chat_of(message_body(body(thinking=thinking)))
    assert conversation(chat).variables == variables
    assert form(chat, "").shows_reasoning is is_shown


def test_effort_and_schema_of_the_output() -> None:
    chat = chat_of(message_body(body(output_config=FORMAT | {"effort": "high"})))
    assert conversation(chat).variables == {"reasoning_effort": "high"}
    guided = wanted(chat).sampling.guided_decoding
    assert guided is not None and guided.json == '{"type":"object"}'


@pytest.mark.parametrize("engine", ["mock", "torch"])
def test_a_schema_that_nobody_can_follow_is_named_as_the_client_calls_it(engine: str) -> None:
    wrong = {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}
    with pytest.raises(InvalidRequest, match=r"^output_config\.format"):
        served(chat_of(message_body(body(output_config=wrong))), engine, SCHEMA_FIELD)


def test_an_answer_that_was_begun_goes_on() -> None:
    begun = conversation(chat_of(message_body(body(messages=[*HELLO, assistant(text("The"))]))))
    assert begun.continue_final_message and not begun.add_generation_prompt
    assert begun.messages[-1]["content"] == "The"
    empty = conversation(chat_of(message_body(body(messages=[*HELLO, {"role": "assistant", "content": ""}]))))
    assert not empty.continue_final_message
    assert [message["role"] for message in empty.messages] == ["user"]


def test_a_tool_that_failed_says_so() -> None:
    asked = chat_of(message_body(body(messages=[*HELLO, assistant(CALL), user(result("no", is_error=True))])))
    assert asked.messages[-1].content == "Error: no"


def test_counting_needs_no_limit_of_the_answer() -> None:
    given = json.loads(body(system="S"))
    del given["max_tokens"]
    chat = chat_of(count_body(json.dumps(given).encode()))
    assert [message["role"] for message in conversation(chat).messages] == ["system", "user"]
