"""Rows that chats and completions share: fields that both routes honour. A choice of one text makes a small model say what is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.surface.matrix.case import Answer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
SENTENCE = "one two three END four 🙂🙂 漢字 five"


def says(text: str, **more: Any) -> dict[str, Any]:
    """Fields with which the answer is this text."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 120, **more}


LIMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max-tokens-1": {"max_tokens": 1},
    "min-tokens": {"min_tokens": 5, "max_tokens": 8},
    "ignore-eos": {"ignore_eos": True, "max_tokens": 12},
    "n-2": {"n": 2},
    "n-5": {"n": 5, "max_tokens": 3},
    "n-3-greedy": {"n": 3, "temperature": 0},
    "truncated": {"truncate_prompt_tokens": 8},
    "truncated-to-fit": {"truncate_prompt_tokens": -1},
    "cache-salt": {"cache_salt": "matrix"},
    "seed-negative": {"seed": -5},
    "nulls": {"stop": None, "n": None, "temperature": None, "logit_bias": None, "response_format": None, "stream_options": None},
    "asks-nothing": {"user": "u", "use_beam_search": False, "prompt_logprobs": None, "unknown_field": {"a": 1}},
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature-low": {"temperature": 0.3},
    "temperature-high": {"temperature": 2},
    "top-p": {"top_p": 0.5},
    "top-k": {"top_k": 3},
    "top-k-off": {"top_k": -1},
    "min-p": {"min_p": 0.2},
    "presence-penalty": {"presence_penalty": 1.5},
    "frequency-penalty": {"frequency_penalty": -1},
    "repetition-penalty": {"repetition_penalty": 1.3},
    "logit-bias": {"logit_bias": {"300": 100}, "max_tokens": 4, "temperature": 0},
    "all-of-sampling": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "repetition_penalty": 1.05},
}  # fmt: skip
STOPS: dict[str, dict[str, Any]] = {
    "stop-text": says(SENTENCE, stop="END"),
    "stop-list": says(SENTENCE, stop=["never", "two th", "END"]),
    "stop-16": says(SENTENCE, stop=[f"no {number}" for number in range(15)] + ["five"]),
    "stop-emoji": says(SENTENCE, stop=["🙂 "]),
    "stop-included": says(SENTENCE, stop=["three E"], include_stop_str_in_output=True),
    "stop-never": says(SENTENCE, stop=["never"]),
    "stop-n-2": says(SENTENCE, stop=["END"], n=2),
    "stop-token": {"logit_bias": {"300": 100}, "stop_token_ids": [300], "temperature": 0},
    "stop-token-included": {"logit_bias": {"300": 100}, "stop_token_ids": [300], "temperature": 0, "include_stop_str_in_output": True},
    "special-tokens-shown": {"skip_special_tokens": False, "logit_bias": {"2": 100}, "ignore_eos": True, "max_tokens": 2},
    "special-tokens-hidden": {"logit_bias": {"3": 100}, "max_tokens": 2},
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "format-text": {"response_format": {"type": "text"}},
    "format-json-object": {"response_format": {"type": "json_object"}, "max_tokens": 24},
    "format-json-schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA,
        "strict": True}}, "max_tokens": 60},
    "format-json-schema-n-2": {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        "max_tokens": 60, "n": 2},
    "outputs-json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60},
    "outputs-json-object": {"structured_outputs": {"json_object": True}, "max_tokens": 24},
    "outputs-regex": {"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}, "max_tokens": 30},
    "outputs-choice": {"structured_outputs": {"choice": ["red", "green"]}, "max_tokens": 30},
    "outputs-grammar": {"structured_outputs": {"grammar": 'start: "x" "y"+ "z"'}, "max_tokens": 30, "logit_bias": {"93": 2}},
    "guided-json": {"guided_json": SCHEMA, "max_tokens": 60},
    "guided-json-text": {"guided_json": json.dumps(SCHEMA), "max_tokens": 60},
    "guided-regex": {"guided_regex": "(yes|no)!", "max_tokens": 30},
    "guided-choice": {"guided_choice": ["漢字", "🙂"], "max_tokens": 30},
    "guided-grammar": {"guided_grammar": 'start: "a" "b"?', "max_tokens": 30},
    "guided-grammar-ebnf": {"guided_grammar": 'root ::= "a" [b]?', "max_tokens": 30},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    **{f"tier-{tier}": {"service_tier": tier, "max_tokens": 2} for tier in ("auto", "default", "scale", "priority", "fast",
        "flex", "batch")},
    **{f"priority-{value}": {"priority": value, "max_tokens": 2} for value in (-1, 0, 1)},
    "priority-wins": {"priority": 1, "service_tier": "priority", "max_tokens": 2},
    "usage-in-stream": {"stream": True, "stream_options": {"include_usage": True}},
    "usage-in-stream-n-2": {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
    "usage-all-along": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "usage-all-along-without-last": {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    "stream-false": {"stream": False},
}  # fmt: skip
COMMON = {**LIMITS, **SAMPLING, **STOPS, **FORMS, **WAYS}

TIERS = {"auto": "default", "default": "default", "scale": "default", "priority": "priority", "fast": "priority",
    "flex": "flex", "batch": "flex"}  # fmt: skip


def is_text(*texts: str) -> Callable[[Answer], None]:
    """Each choice says this."""

    def check(answer: Answer) -> None:
        assert [one.text for one in answer.said] == list(texts)
        assert {one.finish for one in answer.said} == {"stop"}

    return check


def matches(pattern: str) -> Callable[[Answer], None]:
    """Each choice is of this form."""

    def check(answer: Answer) -> None:
        assert all(re.fullmatch(pattern, one.text) for one in answer.said), [one.text for one in answer.said]

    return check


def is_city(answer: Answer) -> None:
    """Each choice follows `SCHEMA`."""
    for one in answer.said:
        value = json.loads(one.text)
        assert set(value) == {"city", "warm"} and value["city"] in ("Oslo", "Rome") and type(value["warm"]) is bool


def begins_json(answer: Answer) -> None:
    """An object, or the beginning of one that was cut."""
    for one in answer.said:
        assert one.text.startswith("{")
        assert one.finish == "length" or isinstance(json.loads(one.text), dict)


def ends_with(word: str) -> Callable[[Answer], None]:
    """Each choice has this finish reason."""

    def check(answer: Answer) -> None:
        assert {one.finish for one in answer.said} == {word}

    return check


MORE: dict[str, Callable[[Answer], object]] = {
    "max-tokens-1": ends_with("length"),
    "ignore-eos": ends_with("length"),
    "stop-text": is_text("one two three "),
    "stop-list": is_text("one "),
    "stop-16": is_text("one two three END four 🙂🙂 漢字 "),
    "stop-emoji": is_text("one two three END four 🙂"),
    "stop-included": is_text("one two three E"),
    "stop-never": is_text(SENTENCE),
    "stop-n-2": is_text("one two three ", "one two three "),
    "stop-token": is_text(""),
    "special-tokens-shown": matches(r"(<\|end\|>){2}"),
    "special-tokens-hidden": matches(""),
    "format-json-object": begins_json,
    "format-json-schema": is_city,
    "format-json-schema-n-2": is_city,
    "outputs-json": is_city,
    "outputs-json-object": begins_json,
    "outputs-regex": matches("[0-9]{3}-[a-c]{2}"),
    "outputs-choice": matches("red|green"),
    "outputs-grammar": matches("xy+z?"),
    "guided-json": is_city,
    "guided-json-text": is_city,
    "guided-regex": matches("(yes|no)!"),
    "guided-choice": matches("漢字|🙂"),
    "guided-grammar": matches("ab?"),
    "guided-grammar-ebnf": matches("ab?"),
}


def check_facts(answer: Answer, choices: int, made: int) -> None:
    """What any answer of chats and completions says of itself. `made`: choices of which those told are the best."""
    asked, said, usage = answer.case.asked, answer.said, answer.usage
    assert len(said) == choices
    limits = (asked.get("max_completion_tokens"), asked.get("max_tokens"), 512)
    longest = next(limit for limit in limits if limit is not None)
    options = asked.get("stream_options") or {}
    assert (usage is not None) == (not asked.get("stream") or bool(options.get("include_usage")))
    if usage is not None:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        assert min(choices, choices * longest) <= usage["completion_tokens"] <= made * longest
        if all(one.finish == "length" for one in said) and made == choices:
            assert usage["completion_tokens"] == choices * longest
        told = sum(len(one.tokens) for one in said)
        echoed = (asked.get("n") or 1) * usage["prompt_tokens"] if asked.get("echo") else 0
        assert told in (0, usage["completion_tokens"] + echoed) or made > choices, "each token has its log probability"
    for one in said:
        _check_choice(asked, one)


def check_counts(answer: Answer, events: list[dict[str, Any]]) -> None:
    """The events of one stream have one head, and what they count grows to the end."""
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    counts = [event["usage"]["completion_tokens"] for event in events if "usage" in event]
    assert counts == sorted(counts)
    options = answer.case.asked.get("stream_options") or {}
    for event in events:
        assert ("usage" in event) == (not event["choices"] or bool(options.get("continuous_usage_stats")))
    if options.get("include_usage"):
        assert events[-1]["choices"] == []
        answer.usage = events[-1]["usage"]


def _check_choice(asked: dict[str, Any], one: Any) -> None:
    stops = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
    for stop in stops:
        assert stop not in one.text or (asked.get("include_stop_str_in_output") and one.text.endswith(stop))
    wanted = asked.get("logprobs")
    assert one.has_logprobs == (wanted is not None and wanted is not False), (
        "log probabilities where they are asked for"
    )
    if one.has_logprobs and not stops and one.finish == "length" and not asked.get("echo"):
        assert "".join(token["token"] for token in one.tokens) == one.text or "\ufffd" in one.text
    most = asked.get("top_logprobs") or (wanted if type(wanted) is int else 0) or 0
    for token in one.tokens[1 if asked.get("echo") else 0 :]:
        assert len(token["top"]) in (most, most + 1)
        assert token["logprob"] <= 1e-6


def check_prompt(asked: dict[str, Any], told: list[dict[str, Any] | None] | None) -> None:
    """What is told of the prompt, where it is asked for: of each token but the first itself and the likeliest."""
    most = asked.get("prompt_logprobs")
    assert (told is None) == (most is None)
    if told is None or most is None:
        return
    assert told[0] is None
    for entry in told[1:]:
        assert entry is not None and len(entry) in (max(1, most), most + 1)
        for said in entry.values():
            assert set(said) == {"logprob", "rank", "decoded_token"}
            assert said["logprob"] <= 1e-6 and said["rank"] >= 1


def check_tier(answer: Answer, told: str | None) -> None:
    """It is told where it was asked for."""
    asked = answer.case.asked
    wanted = TIERS.get(asked.get("service_tier") or "")
    assert told == ("flex" if wanted and (asked.get("priority") or 0) > 0 else wanted)
