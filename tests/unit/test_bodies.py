"""Request bodies: what is wrong is named by its path, what is not given is default, what cannot be honoured is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.answer_form import PLAIN
from pipeline.errors import InvalidRequest
from pipeline.preprocess import Wanted
from pipeline.surface.asks import conversation, form, wanted
from pipeline.surface.bodies import chat_body, completion_body, digest, prompts_of

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
OTHER = {"type": "function", "function": {"name": "g"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
WRONG = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO} | fields).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi"} | fields).encode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "function", "content": "x"}]}, "messages[1].role"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [WRONG]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "f"}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"echo": True}, "echo"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"service_tier": "fastest"}, "service_tier"),
    ],
)
def test_a_wrong_chat_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_body(chat(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt[1]"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_wrong_completion_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion_body(completion(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b'{"model"',
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b"[" * 50_000,
        b'{"a":NaN}',
    ],
)
def test_what_is_no_json_object_is_refused_without_a_path(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_body(raw)
    assert caught.value.param is None
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("raw", [b'{"model":"\\ud800","messages":[]}', chat(user="x" * 10_000, n="y" * 100_000)])
def test_messages_do_not_echo_at_length(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_body(raw)
    assert len(str(caught.value)) < 300


def test_what_is_not_supported_is_said_so() -> None:
    with pytest.raises(InvalidRequest, match=r"^audio is not supported$"):
        chat_body(chat(audio={"voice": "x"}))


@pytest.mark.parametrize("raw", [b"", b" \n\t "])
def test_an_empty_body_is_called_so(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the body is empty") as caught:
        chat_body(raw)
    assert caught.value.param is None


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"service_tier": "gold"}, "service_tier", "one of auto, batch, default, fast, flex, priority, scale"),
        (
            {"messages": [*HELLO, {"role": "boss", "content": "x"}]},
            "messages[1].role",
            "one of assistant, developer, system, tool, user",
        ),
        ({"tool_choice": "maybe"}, "tool_choice", "one of auto, none, required"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type", "one of function, allowed_tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}},
            "tool_choice.allowed_tools.mode",
            "one of auto, required",
        ),
        ({"tools": [TOOL, TOOL | {"type": "x"}]}, "tools[1].type", "function"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object, json_schema"),
    ],
)
def test_a_word_that_is_not_allowed_is_told_those_that_are(fields: dict[str, Any], param: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_body(chat(**fields))
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")
    assert str(caught.value).endswith(f"', expected {allowed}")


def test_a_template_of_a_clients_own_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidRequest, match=r"^chat_template is not taken from a client, for security: ") as caught:
        chat_body(chat(chat_template="{{ messages }}"))
    assert (caught.value.param, caught.value.code) == ("chat_template", "unsupported_parameter")
    assert chat_body(chat(chat_template=None)).chat_template is None


def test_unknown_fields_are_ignored_and_null_is_not_given() -> None:
    fields = [
        "max_tokens", "max_completion_tokens", "stop", "seed", "n", "temperature", "top_p", "stream", "stream_options",
        "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "logit_bias", "presence_penalty",
        "frequency_penalty", "user", "metadata", "store", "service_tier",
    ]  # fmt: skip
    body = chat_body(chat(**dict.fromkeys(fields), whatever={"a": 1}))
    assert wanted(body) == Wanted() == wanted(chat_body(chat()))


def test_values_that_ask_for_nothing_are_welcome() -> None:
    chat_body(
        chat(
            tools=[], tool_choice="auto", response_format={"type": "text"}, logprobs=False, top_logprobs=0, logit_bias={},
            presence_penalty=0.0, frequency_penalty=0, repetition_penalty=1.0, min_p=0, modalities=["text"],
        )
    )  # fmt: skip
    completion_body(completion(best_of=2, n=2, echo=False, suffix="", logprobs=None))


def test_what_is_wanted_reaches_the_pipeline() -> None:
    body = chat_body(
        chat(
            max_tokens=7, max_completion_tokens=5, stop="x", seed=-3, n=2, temperature=0, top_p=0.5, top_k=-1, min_tokens=2,
            stop_token_ids=[9], ignore_eos=True, skip_special_tokens=False, include_stop_str_in_output=True,
        )
    )  # fmt: skip
    found = wanted(body)
    assert (found.stop.max_tokens, found.stop.stop, found.stop.min_tokens) == (5, ["x"], 2)
    assert (found.stop.stop_token_ids, found.stop.ignore_eos) == ([9], True)
    sampling = found.sampling
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (2, 0.0, 0.5, 0, -3)
    assert sampling.include_stop_str_in_output
    assert not found.output.skip_special_tokens


def test_messages_reach_the_template_as_text_and_arguments_as_objects() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    found = conversation(chat_body(chat(messages=messages, tools=[OTHER], reasoning_effort="none")))
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert found.messages == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [called], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert found.tools == [{"type": "function", "function": {"name": "g"}}]
    assert found.variables == {"reasoning_effort": "none", "enable_thinking": False}


@pytest.mark.parametrize(
    ("choice", "mode", "names", "is_forced"),
    [
        (None, "auto", ["f", "g"], False),
        ("none", "none", ["f", "g"], False),
        ("required", "required", ["f", "g"], True),
        ({"type": "function", "function": {"name": "g"}}, "named", ["g"], True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}}, "auto", ["g"], False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}}, "required", ["g"], True),
    ],
)
def test_a_choice_of_tools_says_which_and_whether_a_grammar_makes_the_call(
    choice: Any, mode: str, names: list[str], is_forced: bool
) -> None:
    body = chat_body(chat(tools=[TOOL, OTHER], tool_choice=choice))
    found = form(body, "")
    assert (found.tool_choice, [tool["function"]["name"] for tool in found.tools]) == (mode, names)
    assert (wanted(body).sampling.guided_decoding is not None) == is_forced == found.has_forced_call
    assert bool(conversation(body).tools) == (mode != "none")


def test_a_forced_call_is_a_constraint_and_there_is_one_a_request() -> None:
    body = chat_body(chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}))
    with pytest.raises(InvalidRequest, match="tool_choice and response_format"):
        wanted(body)


def test_the_best_of_some_are_told_and_their_log_probabilities_only_if_asked_for() -> None:
    body = completion_body(completion(n=2, best_of=5))
    assert (wanted(body).sampling.n, wanted(body).output.logprobs) == (5, 0)
    assert (form(body, "").keeps, form(body, "").hides_logprobs) == (2, True)
    assert not form(completion_body(completion(n=2, best_of=5, logprobs=1)), "").hides_logprobs
    assert form(completion_body(completion(n=2, best_of=2)), "") == PLAIN


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", [("prompt", "a")]),
        (["a"], [("prompt", "a")]),
        ([1, 2], [("prompt", [1, 2])]),
        ([[1, 2]], [("prompt", [1, 2])]),
        ([], [("prompt", [])]),
        ([5], [("prompt", [5])]),
        (["a", [1], "b"], [("prompt[0]", "a"), ("prompt[1]", [1]), ("prompt[2]", "b")]),
    ],
)
def test_prompts_are_taken_in_each_of_openais_forms(prompt: Any, found: Any) -> None:
    assert prompts_of(completion_body(completion(prompt=prompt))) == found


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
    ],
)
def test_what_are_no_prompts_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts_of(completion_body(completion(**fields)))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1, "stop": None},
        {"stream": True},
        {"priority": -1},
        {"service_tier": "flex"},
        {"user": "somebody"},
        {"chat_template_kwargs": {"b": 1, "a": 2}},
    ],
)
def test_bodies_that_ask_for_the_same_answer_have_one_digest(fields: dict[str, Any]) -> None:
    base = {"temperature": 1.0} if "temperature" in fields else {}
    if "chat_template_kwargs" in fields:
        base = {"chat_template_kwargs": {"a": 2, "b": 1}}
    assert digest(chat_body(chat(**fields))) == digest(chat_body(chat(**base)))


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "ho"}]},
        {"model": "n"},
        {"max_tokens": 3},
        {"seed": 0},
        {"stop": ["x"]},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_bodies_that_ask_for_another_answer_have_another_digest(fields: dict[str, Any]) -> None:
    assert digest(chat_body(chat(**fields))) != digest(chat_body(chat()))
