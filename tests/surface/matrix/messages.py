"""Anthropic's messages: every field that they honour, whole and streamed, and counts of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pydantic_core
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent

from tests.openai_types import strictly
from tests.surface.matrix.case import THINKER, Answer, Case, Said, both
from tests.surface.matrix.common import SCHEMA
from tests.system import POOL

PATH = "/v1/messages"
COUNT = PATH + "/count_tokens"
QUESTION = {"role": "user", "content": "Tell me a story."}
BASE: dict[str, Any] = {"model": POOL, "messages": [QUESTION], "max_tokens": 6, "temperature": 0}
THINKING = {**BASE, "model": THINKER, "max_tokens": 60}
TOOLS: list[dict[str, Any]] = [
    {"name": "weather", "description": "x", "input_schema": SCHEMA},
    {"name": "clock", "type": "custom", "input_schema": {"type": "object", "additionalProperties": False}},
]
THOUGHTS = {"type": "object", "properties": {"a": {"const": "<think>It is Rome.</think>Sunny."}}, "required": ["a"],
    "additionalProperties": False}  # fmt: skip
USED = {"role": "assistant", "content": [{"type": "text", "text": "See."}, {"type": "tool_use", "id": "toolu_1",
    "name": "weather", "input": {"city": "Oslo"}}]}  # fmt: skip


def schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "max_tokens": 60}


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def result(**fields: Any) -> dict[str, Any]:
    return turns(
        QUESTION, USED, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", **fields}]}
    )


PROMPTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "system": {"system": "Be kind."},
    "system-blocks": {"system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]},
    "system-role": turns(QUESTION, {"role": "system", "content": "Be kind."}, QUESTION),
    "blocks": turns({"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}),
    "turns": turns(QUESTION, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "And then?"}),
    "neighbours": turns(QUESTION, QUESTION),
    "prefilled": turns(QUESTION, {"role": "assistant", "content": "Once upon"}),
    "thoughts": turns(QUESTION, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "A."}]}, QUESTION),
    "tool-result": {**result(content="cold"), "tools": TOOLS},
    "tool-result-blocks": {**result(content=[{"type": "text", "text": "cold"}]), "tools": TOOLS},
    "tool-result-error": {**result(content="no", is_error=True), "tools": TOOLS},
    "tool-result-empty": {**result(), "tools": TOOLS},
    "tools": {"tools": TOOLS},
    "tools-none": {"tools": TOOLS, "tool_choice": {"type": "none"}},
    "effort": {"output_config": {"effort": "low"}},
    "thinking-disabled": {"thinking": {"type": "disabled"}},
    "thinking-adaptive": {"thinking": {"type": "adaptive"}},
    "of-anthropic-without-effect": {
        "cache_control": {"type": "ephemeral"}, "container": None, "mcp_servers": [], "speed": "standard", "user_profile_id": None,
        "workspace_id": None,
    },
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    **PROMPTS,
    "one-token": {"max_tokens": 1},
    "sampled": {"temperature": 0.5, "top_p": 0.9, "top_k": 1},
    "top-k-0": {"top_k": 0},
    "stop-sequences": schema(SCHEMA) | {"stop_sequences": ["never", ',"warm"']},
    "stop-never": {"stop_sequences": ["never said"]},
    "tier-auto": {"service_tier": "auto"},
    "tier-standard": {"service_tier": "standard_only"},
    "metadata": {"metadata": {"user_id": "u"}, "diagnostics": None, "inference_geo": "eu"},
    "tools-auto": {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    "tools-any": {"tools": TOOLS[:1], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 80},
    "tools-any-torn": {"tools": TOOLS[:1], "tool_choice": {"type": "any"}, "max_tokens": 12},
    "tools-named": {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 60},
    "tools-named-torn": {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 4},
    "schema": schema(SCHEMA),
    "stream-false": {"stream": False},
}  # fmt: skip
THINKS: dict[str, dict[str, Any]] = {
    "thinking": schema(THOUGHTS),
    "thinking-enabled": schema(THOUGHTS) | {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "thinking-omitted": schema(THOUGHTS) | {"thinking": {"type": "adaptive", "display": "omitted"}},
    "thinking-not-shown": schema(THOUGHTS) | {"thinking": {"type": "disabled"}},
    "thinking-cut": schema(THOUGHTS) | {"max_tokens": 9},
}


def is_city(answer: Answer) -> None:
    assert set(json.loads(answer.said[0].text)) == {"city", "warm"}


def calls(answer: Answer) -> None:
    assert [name for name, _ in answer.said[0].calls] == ["weather"]
    assert set(json.loads(answer.said[0].calls[0][1])) == {"city", "warm"}
    assert answer.said[0].finish == "tool_use"


def stops(answer: Answer) -> None:
    assert answer.said[0].finish == 'stop_sequence ,"warm"'
    assert "warm" not in answer.said[0].text


def ends_with(word: str) -> Callable[[Answer], None]:
    def check_end(answer: Answer) -> None:
        assert answer.said[0].finish == word

    return check_end


def thought(reasoning: str) -> Callable[[Answer], None]:
    def check_thoughts(answer: Answer) -> None:
        assert (answer.said[0].reasoning, answer.said[0].text) == (reasoning, '{"a":"Sunny."}')

    return check_thoughts


MORE: dict[str, Callable[[Answer], object]] = {
    "one-token": ends_with("max_tokens"),
    "stop-sequences": stops,
    "tools-any": calls,
    "tools-any-torn": ends_with("max_tokens"),
    "tools-named": calls,
    "tools-named-torn": ends_with("max_tokens"),
    "schema": is_city,
    "thinking": thought("It is Rome."),
    "thinking-enabled": thought("It is Rome."),
    "thinking-omitted": thought(""),
    "thinking-not-shown": thought(""),
    "thinking-cut": ends_with("max_tokens"),
}


def check(answer: Answer) -> None:
    """A message, or the events of one."""
    asked = answer.case.asked
    body = _message_of(answer, _events(answer)) if answer.is_stream else answer.json
    strictly(Message, body)
    said = Said(finish=body["stop_reason"])
    if body["stop_sequence"] is not None:
        said.finish = f"{said.finish} {body['stop_sequence']}"
    assert (body["stop_reason"] == "stop_sequence") == (body["stop_sequence"] is not None)
    for block in body["content"]:
        match block["type"]:
            case "text":
                said.text += block["text"]
            case "thinking":
                said.reasoning += block["thinking"]
            case "tool_use":
                said.calls.append([block["name"], json.dumps(block["input"])])
    answer.said, usage = [said], body["usage"]
    assert (body["model"], body["id"][:4]) == (asked["model"], "msg_")
    assert 0 < usage["output_tokens"] <= asked["max_tokens"]
    assert (body["stop_reason"] == "max_tokens") <= (usage["output_tokens"] == asked["max_tokens"])
    told = {None: None, "auto": "standard", "standard_only": "standard"}[asked.get("service_tier")]
    assert usage.get("service_tier") == told


def _events(answer: Answer) -> list[dict[str, Any]]:
    """The events but pings, each checked."""
    events: list[dict[str, Any]] = []
    assert answer.content.endswith(b"\n\n")
    for block in answer.content.split(b"\n\n")[:-1]:
        name, said = block.split(b"\n")
        event: dict[str, Any] = json.loads(said.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        if event != {"type": "ping"}:  # for which there is no type
            strictly(RawMessageStreamEvent, event)  # type: ignore[arg-type]
            events.append(event)
    answer.num_events = len(events)
    return events


def _message_of(answer: Answer, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events tell, as Anthropic's client puts it together."""
    assert (events[0]["type"], events[-2]["type"], events[-1]["type"]) == (
        "message_start",
        "message_delta",
        "message_stop",
    )
    message: dict[str, Any] = events[0]["message"]
    torn = ""
    for event in events[1:-2]:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert index == len(message["content"])
                message["content"].append(block)
                torn = ""
            case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}:
                message["content"][-1]["text"] += text
            case {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": text}}:
                message["content"][-1]["thinking"] += text
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": text}}:
                torn += text
                message["content"][-1]["input"] = _partial(torn)
            case {"type": "content_block_delta", "delta": {"type": "signature_delta"}} | {"type": "content_block_stop"}:
                pass
            case _:
                raise AssertionError(event)
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message


def _partial(text: str) -> Any:
    return pydantic_core.from_json(text, allow_partial=True)


def check_count(answer: Answer) -> None:
    """As many as a message of the same prompt has."""
    strictly(MessageTokensCount, answer.json)
    usage = answer.others[answer.case.id.replace("count/", "message/") + "/whole"].json["usage"]
    assert answer.json["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


CASES: list[Case] = [
    *both("message", PATH, ROWS, BASE, check, MORE),
    *both("message", PATH, THINKS, THINKING, check, MORE),
    *(
        Case(id=f"count/{name}", path=COUNT, check=check_count, body={"model": POOL, "messages": [QUESTION], **fields})
        for name, fields in PROMPTS.items()
    ),
]
