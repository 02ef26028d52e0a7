"""Responses: made whole, streamed and in the background, read again, gone on from, cancelled and deleted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from openai.types.responses import Response, ResponseItemList

from tests.openai_types import events_in, strictly
from tests.surface.matrix.case import THINKER, Answer, Case, Said
from tests.surface.matrix.common import SCHEMA, TIERS
from tests.system import POOL

PATH = "/v1/responses"
ONE = PATH + "/{id}"
BASE: dict[str, Any] = {"model": POOL, "input": "Tell me a story.", "max_output_tokens": 6, "seed": 7}
THOUGHTS = {"type": "object", "properties": {"a": {"const": "<think>It is Rome.</think>Sunny."}}, "required": ["a"],
    "additionalProperties": False}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "description": "x", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "clock", "parameters": {"type": "object", "additionalProperties": False}, "strict": False},
]  # fmt: skip
NAMED = {"type": "function", "name": "weather"}
FORMAT = {"type": "json_schema", "name": "city", "schema": SCHEMA}
LOGPROBS = ["message.output_text.logprobs"]
MESSAGE = {"role": "user", "content": "What is it?"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "cold"}

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit-bias": {"logit_bias": {"300": 100}, "temperature": 0},
    "one-token": {"max_output_tokens": 1},
    "min-tokens": {"min_tokens": 5, "max_output_tokens": 8},
    "ignore-eos": {"ignore_eos": True, "max_output_tokens": 10},
    "cache-salt": {"cache_salt": "matrix"},
    "instructions": {"instructions": "Be brief."},
    "metadata": {"metadata": {"a": "b", "c": ""}},
    "who": {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
    "not-stored": {"store": False},
    "stored": {"store": True},
    "truncation-auto": {"truncation": "auto"},
    "truncation-disabled": {"truncation": "disabled"},
    **{f"tier-{tier}": {"service_tier": tier, "max_output_tokens": 2} for tier in TIERS},
    "priority": {"priority": -1, "max_output_tokens": 2},
    "input-messages": {"input": [{"role": "system", "content": "Be brief."}, MESSAGE]},
    "input-parts": {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
    "input-turns": {"input": [MESSAGE, {"role": "assistant", "content": [{"type": "output_text", "text": "A fox."}]}, MESSAGE]},
    "input-call": {"input": [MESSAGE, CALL, OUTPUT], "tools": TOOLS},
    "input-call-parts": {"input": [MESSAGE, CALL, OUTPUT | {"output": [{"type": "input_text", "text": "cold"}]}], "tools": TOOLS},
    "input-reasoning": {"input": [MESSAGE, {"type": "reasoning", "id": "rs_1", "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}]}, {"role": "assistant", "content": "So."}, MESSAGE]},
    "format-text": {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
    "format-json-object": {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 24},
    "format-json-schema": {"text": {"format": FORMAT | {"strict": True, "description": "d"}}, "max_output_tokens": 60},
    "stop": {"text": {"format": FORMAT}, "max_output_tokens": 60, "stop": [',"warm"']},
    "logprobs": {"include": LOGPROBS},
    "top-logprobs": {"include": LOGPROBS, "top_logprobs": 3},
    "top-logprobs-alone": {"top_logprobs": 1},
    "logprobs-schema": {"include": LOGPROBS, "text": {"format": FORMAT}, "max_output_tokens": 60},
    "include-nothing-here": {"include": ["reasoning.encrypted_content", "file_search_call.results"]},
    "effort": {"reasoning": {"effort": "low", "summary": "auto"}},
    "effort-none": {"reasoning": {"effort": "none", "generate_summary": "concise"}},
    "reasoning": {"model": THINKER, "text": {"format": {"type": "json_schema", "name": "t", "schema": THOUGHTS}}, "max_output_tokens": 60},
    "reasoning-logprobs": {"model": THINKER, "text": {"format": {"type": "json_schema", "name": "t", "schema": THOUGHTS}},
        "max_output_tokens": 60, "include": LOGPROBS},
    "tools-auto": {"tools": TOOLS},
    "tools-none": {"tools": TOOLS, "tool_choice": "none"},
    "tools-required": {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 80},
    "tools-required-parallel": {"tools": TOOLS[1:], "tool_choice": "required", "max_output_tokens": 40},
    "tools-required-torn": {"tools": TOOLS[:1], "tool_choice": "required", "max_output_tokens": 12},
    "tools-named": {"tools": TOOLS, "tool_choice": NAMED, "max_output_tokens": 60},
    "tools-allowed-auto": {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}},
    "tools-allowed-required": {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [NAMED]},
        "parallel_tool_calls": False, "max_output_tokens": 80},
    "max-tool-calls": {"tools": TOOLS, "max_tool_calls": 2},
    "template-variables": {"chat_template_kwargs": {"mood": "kind"}},
    "of-openai-without-effect": {
        "conversation": None, "prompt": None, "moderation": None, "context_management": [], "background_options": {},
            "access_programs": None,
        "image": None, "prompt_cache_retention": "24h", "prompt_cache_options": {}, "stream_options": {"include_obfuscation": False},
    },
}  # fmt: skip
BACKGROUND = (
    "plain",
    "instructions",
    "format-json-schema",
    "top-logprobs",
    "tools-required",
    "reasoning",
    "ignore-eos",
)
READ_AGAIN = ("plain", "tools-required", "reasoning", "reasoning-logprobs", "top-logprobs", "format-json-schema")
EVENT_BORDERS = (0, 1, 2, 3, 5, 8, 1000)


def is_city(answer: Answer) -> None:
    value = json.loads(answer.said[0].text)
    assert set(value) == {"city", "warm"}


def calls(answer: Answer) -> None:
    assert [name for name, _ in answer.said[0].calls] == ["weather"]
    assert set(json.loads(answer.said[0].calls[0][1])) == {"city", "warm"}


def thinks(answer: Answer) -> None:
    assert (answer.said[0].reasoning, answer.said[0].text) == ("It is Rome.", '{"a":"Sunny."}')


def is_cut(answer: Answer) -> None:
    assert answer.said[0].finish == "incomplete"


def ends_before_warm(answer: Answer) -> None:
    assert answer.said[0].text in ('{"city":"Oslo"', '{"city":"Rome"')


MORE: dict[str, Callable[[Answer], object]] = {
    "one-token": is_cut,
    "ignore-eos": is_cut,
    "format-json-schema": is_city,
    "logprobs-schema": is_city,
    "stop": ends_before_warm,
    "reasoning": thinks,
    "reasoning-logprobs": thinks,
    "tools-required": calls,
    "tools-required-torn": is_cut,
    "tools-named": calls,
    "tools-allowed-required": calls,
}


def check(answer: Answer) -> None:
    """A response, or the events of one."""
    if answer.is_stream:
        events = events_in(answer.content)
        answer.num_events = len(events)
        body = _check_events(answer, events)
    else:
        body = answer.json
        strictly(Response, body)
    answer.said = [said_of(body)]
    _check_facts(answer, body)


def said_of(body: Mapping[str, Any]) -> Said:
    """All items as one choice."""
    said = Said(finish=body["status"])
    for item in body["output"]:
        for part in item.get("content") or []:
            if item["type"] == "reasoning":
                said.reasoning += part["text"]
            else:
                said.text += part["text"]
                said.tokens += [
                    {**one, "top": [top["token"] for top in one["top_logprobs"]]} for one in part["logprobs"]
                ]
        if item["type"] == "function_call":
            said.calls.append([item["name"], item["arguments"]])
    return said


def _check_events(answer: Answer, events: list[dict[str, Any]]) -> dict[str, Any]:
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    last: dict[str, Any] = events[-1]["response"]
    if first == 0:
        said = said_of(last)
        for kind, text in (
            ("response.output_text", said.text),
            ("response.reasoning_text", said.reasoning),
            ("response.function_call_arguments", "".join(arguments for _, arguments in said.calls)),
        ):
            assert "".join(event["delta"] for event in events if event["type"] == f"{kind}.delta") == text
        assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == f"response.{'failed' if last['status'] == 'cancelled' else last['status']}"
    return last


def _check_facts(answer: Answer, body: Mapping[str, Any]) -> None:
    asked = answer.case.asked
    for name in ("instructions", "metadata", "user", "safety_identifier", "prompt_cache_key", "previous_response_id"):
        if name in asked and asked[name] != "{id}":
            assert body[name] == asked[name]
    for name in ("temperature", "top_p", "tool_choice", "max_output_tokens", "max_tool_calls", "truncation", "store"):
        if name in asked:
            assert body[name] == asked[name]
    if asked.get("service_tier"):
        assert body["service_tier"] == TIERS[asked["service_tier"]]
    if body["status"] not in ("completed", "incomplete"):
        return
    usage, (said,) = body["usage"], answer.said
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] <= body["max_output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]
    is_incomplete = body["status"] == "incomplete"
    assert body["incomplete_details"] == ({"reason": "max_output_tokens"} if is_incomplete else None)
    if is_incomplete:
        assert usage["output_tokens"] == body["max_output_tokens"]
    if asked and (asked.get("include") == LOGPROBS or asked.get("top_logprobs")):
        assert said.tokens and {len(one["top"]) for one in said.tokens} == {asked.get("top_logprobs") or 0}
    elif asked:
        assert not said.tokens


def is_as_before(answer: Answer) -> None:
    """What is read again is what was answered."""
    if answer.before.is_stream and not answer.is_stream:
        assert answer.json == events_in(answer.before.content)[-1]["response"]
    else:
        assert answer.content == answer.before.content


def is_behind(border: int) -> Callable[[Answer], None]:
    """The events behind a sequence number, byte by byte."""

    def check_rest(answer: Answer) -> None:
        blocks = answer.before.content.split(b"\n\n")[:-1]
        assert answer.content == b"".join(block + b"\n\n" for block in blocks[border + 1 :])
        answer.num_events = len(blocks[border + 1 :])

    return check_rest


def status_is(status: str) -> Callable[[Answer], None]:
    def check_status(answer: Answer) -> None:
        assert answer.said[0].finish == status

    return check_status


def check_items(answer: Answer) -> None:
    strictly(ResponseItemList, answer.json)
    ids = [item["id"] for item in answer.json["data"]]
    assert (answer.json["first_id"], answer.json["last_id"]) == ((ids[0], ids[-1]) if ids else ("", ""))


def check_deleted(answer: Answer) -> None:
    """OpenAI's client has no type for it; the specification has these three."""
    assert answer.json == {"id": answer.before.id, "object": "response", "deleted": True}


def check_nothing(answer: Answer) -> None:
    """All is in `more`."""


def _made() -> list[Case]:
    cases: list[Case] = []
    for name, fields in ROWS.items():
        for way, more in {"whole": {}, "stream": {"stream": True}}.items():
            like = f"response/{name}/whole" if way == "stream" else ""
            cases.append(_case(f"{name}/{way}", BASE | more | fields, MORE.get(name), like=like))
    for name in BACKGROUND:
        asked = BASE | {"background": True} | ROWS[name]
        background, streamed, done = (f"{name}/{way}" for way in ("background", "background-events", "background-done"))
        cases.append(_case(background, asked, status_is("queued")))
        cases.append(_read(streamed, background, {"stream": "true"}, like=f"response/{name}/whole"))
        cases.append(_read(done, streamed, {}, is_as_before, like=f"response/{name}/whole"))
        cases.append(
            _case(f"{name}/background-stream", asked | {"stream": True}, MORE.get(name), like=f"response/{name}/whole")
        )
    return cases


def _read_again() -> list[Case]:
    cases: list[Case] = []
    for name in READ_AGAIN:
        cases.append(_read(f"{name}/whole-again", f"{name}/whole", {}, is_as_before))
        cases.append(_read(f"{name}/stream-again", f"{name}/stream", {"stream": "true"}, is_as_before))
        cases.append(_read(f"{name}/stream-whole", f"{name}/stream", {}, is_as_before))
    for border in EVENT_BORDERS:
        query = {"stream": "true", "starting_after": str(border)}
        cases.append(
            _read(f"plain/stream-behind-{border}", "plain/stream", query, is_behind(border), check=check_nothing)
        )
    return cases


def _gone_on() -> list[Case]:
    follow = BASE | {"previous_response_id": "{id}", "input": "And then?"}
    long = BASE | {"background": True, "ignore_eos": True, "max_output_tokens": 2000}
    items = ONE + "/input_items"
    return [
        _case("next/whole", follow, after="response/instructions/whole"),
        _case("next/stream", follow | {"stream": True}, after="response/instructions/whole", like="response/next/whole"),
        _case("next/of-a-call", follow | {"input": [OUTPUT | {"call_id": "c1"}]}, after="response/input-call/whole"),
        _case("next/third", follow, after="response/next/whole"),
        *(
            Case(id=f"response/items/{name}", path=items, method="GET", params=query, check=check_items, after=f"response/{before}")
            for name, before, query in (
                ("plain", "plain/whole", {}), ("limit", "input-turns/whole", {"limit": "1"}), ("call", "input-call/whole",
                    {"order": "desc"}),
                ("reasoning", "input-reasoning/whole", {"limit": "100"}), ("conversation", "next/third", {"order": "asc"}),
            )
        ),
        _case("cancel/made", long),
        Case(id="response/cancel/cancelled", path=ONE + "/cancel", check=check, more=status_is("cancelled"), after="response/cancel/made"),
        Case(id="response/cancel/again", path=ONE + "/cancel", check=check, more=status_is("cancelled"), after="response/cancel/cancelled"),
        _read("cancel/read", "cancel/again", {}, status_is("cancelled")),
        _read("cancel/events", "cancel/again", {"stream": "true"}, status_is("cancelled")),
        _case("delete/made", BASE | {"input": "Forget this."}),
        Case(id="response/delete/deleted", path=ONE, method="DELETE", check=check_deleted, after="response/delete/made"),
        _case("delete-running/made", long | {"max_output_tokens": 1999}),
        Case(id="response/delete-running/deleted", path=ONE, method="DELETE", check=check_deleted, after="response/delete-running/made"),
    ]  # fmt: skip


def _case(
    name: str, body: dict[str, Any], more: Callable[[Answer], object] | None = None, *, like: str = "", after: str = ""
) -> Case:
    return Case(id=f"response/{name}", path=PATH, body=body, check=check, more=more, like=like, after=after)


def _read(
    name: str, after: str, params: dict[str, str], more: Callable[[Answer], object] | None = None, *,
    like: str = "", check: Callable[[Answer], None] = check,
) -> Case:  # fmt: skip
    return Case(
        id=f"response/{name}", path=ONE, method="GET", params=params, check=check, more=more, like=like,
        after=f"response/{after}",
    )  # fmt: skip


CASES: list[Case] = [*_made(), *_read_again(), *_gone_on()]
