"""Chat completions: every field that they honour, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.openai_types import strictly
from tests.surface.matrix.case import THINKER, Answer, Case, Said, both, events_of
from tests.surface.matrix.common import (
    COMMON,
    MORE,
    SCHEMA,
    check_counts,
    check_facts,
    check_prompt,
    check_tier,
    ends_with,
    is_text,
    says,
)
from tests.system import POOL

PATH = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Tell me a story."}
BASE: dict[str, Any] = {"model": POOL, "messages": [QUESTION], "max_tokens": 6, "seed": 7}
THINKING = {**BASE, "model": THINKER}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "x", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}}},
]  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "warm": true}}</tool_call>'
CLOCK = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
CALLED = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo", "warm": false}'},
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def allowed(mode: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}


def conversation(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


LENGTHS: dict[str, dict[str, Any]] = {
    "max-completion-tokens": {"max_completion_tokens": 3, "max_tokens": None, "ignore_eos": True},
    "max-completion-tokens-wins": {"max_completion_tokens": 2, "max_tokens": 9, "ignore_eos": True},
}
LOGPROBS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True},
    "logprobs-false": {"logprobs": False},
    **{f"top-logprobs-{most}": {"logprobs": True, "top_logprobs": most} for most in (0, 1, 5, 20)},
    **{f"prompt-logprobs-{most}": {"prompt_logprobs": most} for most in (0, 5)},
    "prompt-logprobs-n-2": {"prompt_logprobs": 1, "n": 2, "logprobs": True},
    "logprobs-n-2": {"logprobs": True, "top_logprobs": 2, "n": 2},
    "logprobs-stop": says("one two END", logprobs=True, top_logprobs=2, stop=["END"]),
    "logprobs-emoji": says("🙂 漢字", logprobs=True, top_logprobs=1),
    "logprobs-schema": {"logprobs": True, "guided_json": SCHEMA, "max_tokens": 60},
    "logprobs-ignore-eos": {"logprobs": True, "ignore_eos": True, "max_tokens": 10},
}
MESSAGES: dict[str, dict[str, Any]] = {
    "system": conversation({"role": "system", "content": "Be brief."}, QUESTION),
    "developer": conversation({"role": "developer", "content": "Be brief."}, QUESTION),
    "parts": conversation({"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}),
    "name": conversation({**QUESTION, "name": "ann"}),
    "turns": conversation(QUESTION, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "And then?"}),
    "refusal": conversation(QUESTION, {"role": "assistant", "refusal": "No."}, QUESTION),
    "refusal-part": conversation(QUESTION, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, QUESTION),
    "thoughts": conversation(QUESTION, {"role": "assistant", "content": "Once.", "reasoning_content": "Hm."}, QUESTION),
    "tool-result": conversation(QUESTION, {"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool",
        "tool_call_id": "call_1", "content": "cold"}),
    "continued": {**conversation(QUESTION, {"role": "assistant", "content": "Once upon"}), "continue_final_message": True,
        "add_generation_prompt": False},
    "without-generation-prompt": {"add_generation_prompt": False},
    "documents": {"documents": [{"title": "t", "text": "The fox runs."}]},
    "template-variables": {"chat_template_kwargs": {"mood": "kind"}},
    "effort-low": {"reasoning_effort": "low"},
    "effort-none": {"reasoning_effort": "none"},
    "of-openai-without-effect": {
        "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
        "prompt_cache_options": {}, "verbosity": "low", "modalities": ["text"], "functions": [], "function_call": "none",
        "moderation": None, "audio": None, "prediction": None, "web_search_options": None, "return_token_ids": False, "echo": False,
    },
}  # fmt: skip
TOOL_USE: dict[str, dict[str, Any]] = {
    "tools-auto-says-text": says("Sunny.", tools=TOOLS),
    "tools-auto-calls": says(CALL, tools=TOOLS, tool_choice="auto"),
    "tools-auto-text-and-call": says("Let me see. " + CALL, tools=TOOLS),
    "tools-auto-two-calls": says(CALL + CLOCK, tools=TOOLS),
    "tools-auto-call-n-2": says(CALL, tools=TOOLS, n=2),
    "tools-auto-torn-call": says(CALL, tools=TOOLS) | {"max_tokens": 9},
    "tools-auto-logprobs": says("Let me see. " + CALL, tools=TOOLS, logprobs=True, top_logprobs=1),
    "tools-none": says(CALL, tools=TOOLS, tool_choice="none"),
    "tools-required": {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80},
    "tools-required-parallel": {"tools": TOOLS[1:], "tool_choice": "required", "max_tokens": 40},
    "tools-required-n-2": {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80, "n": 2},
    "tools-required-torn": {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 12},
    "tools-named": {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 60},
    "tools-named-logprobs": {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 60, "logprobs": True},
    "tools-allowed-auto": says("Sunny.", tools=TOOLS, tool_choice=allowed("auto")),
    "tools-allowed-required": {"tools": TOOLS, "tool_choice": allowed("required"), "parallel_tool_calls": False, "max_tokens": 80},
}  # fmt: skip
REASONING: dict[str, dict[str, Any]] = {
    "reasoning": says("<think>It is Rome.</think>\n\nSunny."),
    "reasoning-hidden": says("<think>It is Rome.</think>\n\nSunny.", include_reasoning=False),
    "reasoning-and-call": says("<think>It is Rome.</think>\n" + CALL, tools=TOOLS),
    "reasoning-cut": says("<think>It is Rome.</think>\n\nSunny.") | {"max_tokens": 4},
    "reasoning-logprobs": says("<think>Hm.</think>Sunny.", logprobs=True, top_logprobs=1),
    "reasoning-n-2": says("<think>Hm.</think>Sunny.", n=2),
    "reasoning-none-came": says("Sunny."),
    "reasoning-usage": says("<think>Hm.</think>Sunny.", stream=True, stream_options={"include_usage": True,
        "continuous_usage_stats": True}),
}  # fmt: skip


def calls(*expected: tuple[str, Any], text: str = "", finish: str = "tool_calls") -> Callable[[Answer], None]:
    """Each choice makes these calls; arguments None: those of `SCHEMA`."""

    def check(answer: Answer) -> None:
        for one in answer.said:
            assert [name for name, _ in one.calls] == [name for name, _ in expected]
            for (_, arguments), (_, wanted) in zip(one.calls, expected, strict=True):
                given = json.loads(arguments)
                assert given == wanted if wanted is not None else set(given) == {"city", "warm"}
            assert (one.text, one.finish) == (text, finish)

    return check


def thought(reasoning: str, text: str) -> Callable[[Answer], None]:
    def check(answer: Answer) -> None:
        assert {(one.reasoning, one.text) for one in answer.said} == {(reasoning, text)}

    return check


WEATHER = ("weather", {"city": "Rome", "warm": True})
CHAT_MORE: dict[str, Callable[[Answer], object]] = {
    "max-completion-tokens": ends_with("length"),
    "max-completion-tokens-wins": ends_with("length"),
    "logprobs-stop": is_text("one two "),
    "logprobs-emoji": is_text("🙂 漢字"),
    "tools-auto-says-text": is_text("Sunny."),
    "tools-auto-calls": calls(WEATHER),
    "tools-auto-text-and-call": calls(WEATHER, text="Let me see."),
    "tools-auto-two-calls": calls(WEATHER, ("clock", {})),
    "tools-auto-call-n-2": calls(WEATHER),
    "tools-auto-torn-call": ends_with("length"),
    "tools-auto-logprobs": calls(WEATHER, text="Let me see."),
    "tools-none": is_text(CALL),
    "tools-required": calls(("weather", None)),
    "tools-required-n-2": calls(("weather", None)),
    "tools-required-torn": ends_with("length"),
    "tools-named": calls(("weather", None)),
    "tools-named-logprobs": calls(("weather", None)),
    "tools-allowed-auto": is_text("Sunny."),
    "tools-allowed-required": calls(("weather", None)),
    "reasoning": thought("It is Rome.", "Sunny."),
    "reasoning-hidden": thought("", "Sunny."),
    "reasoning-and-call": calls(WEATHER),
    "reasoning-cut": ends_with("length"),
    "reasoning-logprobs": thought("Hm.", "Sunny."),
    "reasoning-n-2": thought("Hm.", "Sunny."),
    "reasoning-none-came": thought("", "Sunny."),
    "reasoning-usage": thought("Hm.", "Sunny."),
}


def check(answer: Answer) -> None:
    """A chat completion, or the chunks of one."""
    asked = answer.case.asked
    said = answer.said = [Said() for _ in range(asked.get("n") or 1)]
    bodies = events_of(answer) if answer.is_stream else [answer.json]
    model = ChatCompletionChunk if answer.is_stream else ChatCompletion
    for body in bodies:
        strictly(model, body)  # type: ignore[arg-type]
        assert (body["model"], body["id"]) == (asked["model"], answer.id)
        check_tier(answer, body.get("service_tier"))
        for choice in body["choices"]:
            _add(said[choice["index"]], choice, choice["delta" if answer.is_stream else "message"])
    if answer.is_stream:
        _check_stream(answer, bodies)
    else:
        answer.usage = answer.json["usage"]
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(len(said)))
    check_facts(answer, len(said), len(said))
    told = [body["prompt_logprobs"] for body in bodies if "prompt_logprobs" in body]
    check_prompt(asked, *(told or [None]))
    for one in said:
        assert one.finish in ("stop", "length", "tool_calls")
        assert bool(one.calls) == (one.finish == "tool_calls") or one.finish == "length"


def _add(said: Said, choice: dict[str, Any], message: dict[str, Any]) -> None:
    assert said.finish is None, "nothing follows the end of a choice"
    said.finish = choice["finish_reason"]
    said.text += message.get("content") or ""
    said.reasoning += message.get("reasoning_content") or ""
    for place, call in enumerate(message.get("tool_calls") or []):
        if call.get("index", place) == len(said.calls):
            assert call["id"].startswith("call_") and call["type"] == "function"
            said.calls.append([call["function"]["name"], ""])
        said.calls[call.get("index", place)][1] += call["function"]["arguments"]
    if (told := choice.get("logprobs")) is not None:
        said.has_logprobs = True
        said.tokens += [{**token, "top": [top["token"] for top in token["top_logprobs"]]} for token in told["content"]]


def _check_stream(answer: Answer, chunks: list[dict[str, Any]]) -> None:
    check_counts(answer, chunks)
    begun: set[int] = set()
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        assert (choice["delta"].get("role") == "assistant") == (choice["index"] not in begun)
        begun.add(choice["index"])


ROWS = {**COMMON, **LENGTHS, **LOGPROBS, **MESSAGES, **TOOL_USE}
CASES: list[Case] = [
    *both("chat", PATH, ROWS, BASE, check, {**MORE, **CHAT_MORE}),
    *both("chat", PATH, REASONING, THINKING, check, CHAT_MORE),
]
