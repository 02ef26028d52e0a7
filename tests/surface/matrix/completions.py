"""Completions: every field that they honour, whole and streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.openai_types import StreamedCompletion, WholeCompletion, strictly
from tests.surface.matrix.case import Answer, Case, Said, both, events_of
from tests.surface.matrix.common import (
    COMMON,
    MORE,
    SCHEMA,
    check_counts,
    check_facts,
    check_prompt,
    check_tier,
    is_text,
    says,
)
from tests.system import POOL

PATH = "/v1/completions"
PROMPT = "Once there was"
BASE: dict[str, Any] = {"model": POOL, "prompt": PROMPT, "max_tokens": 6, "seed": 7}

PROMPTS: dict[str, dict[str, Any]] = {
    "prompt-ids": {"prompt": [301, 302, 303]},
    "prompt-list-of-one": {"prompt": ["A fox"]},
    "prompt-ids-list-of-one": {"prompt": [[301, 302]]},
    "prompts-2": {"prompt": ["A fox", "A runner"]},
    "prompts-3-n-2": {"prompt": ["A fox", "A runner", "The baton"], "n": 2},
    "prompts-ids": {"prompt": [[301, 302], [303]]},
    "prompts-mixed": {"prompt": ["A fox", [303]]},
    "prompts-echo-ids": {"prompt": ["A fox", "A runner"], "echo": True, "return_token_ids": True},
    "prompts-best-of": {"prompt": ["A fox", "A runner"], "best_of": 3, "n": 1, "stream": False},
    "prompts-logprobs": {"prompt": ["A fox", "A runner"], "logprobs": 1},
    "prompts-echo-logprobs": {"prompt": ["A fox", [301, 302]], "echo": True, "logprobs": 2, "n": 2},
    "prompts-usage": {"prompt": ["A fox", "A runner"], "stream": True, "stream_options": {"include_usage": True}},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "echo": {"echo": True},
    "echo-false": {"echo": False},
    "echo-n-2": {"echo": True, "n": 2},
    "echo-of-ids": {"echo": True, "prompt": [301, 302]},
    "echo-token-ids": {"echo": True, "return_token_ids": True},
    "echo-stop": says("one END", echo=True, stop=["END"]),
    **{f"echo-logprobs-{most}": {"echo": True, "logprobs": most} for most in (0, 1, 20)},
    "echo-logprobs-n-2": {"echo": True, "logprobs": 1, "n": 2},
    "echo-logprobs-emoji": says("🙂 漢字", prompt="漢 🙂", echo=True, logprobs=1),
    **{f"echo-alone-{most}": {"echo": True, "logprobs": most, "max_tokens": 0} for most in (None, 1)},
    **{f"prompt-logprobs-{most}": {"prompt_logprobs": most} for most in (0, 3, 20)},
    "prompt-logprobs-n-2": {"prompt_logprobs": 1, "n": 2},
    "prompt-logprobs-alone": {"prompt_logprobs": 1, "max_tokens": 0},
    "prompt-logprobs-echo": {"prompt_logprobs": 5, "echo": True, "logprobs": 1, "return_token_ids": True},
    "best-of-3": {"best_of": 3, "stream": False},
    "best-of-4-n-2": {"best_of": 4, "n": 2, "stream": False},
    "best-of-logprobs": {"best_of": 2, "logprobs": 1, "stream": False},
    "best-of-as-n": {"best_of": 2, "n": 2},
    "best-of-token-ids": {"best_of": 2, "return_token_ids": True, "stream": False},
    **{f"logprobs-{most}": {"logprobs": most} for most in (0, 1, 5, 20)},
    "logprobs-off": {"logprobs": False},
    "logprobs-n-2": {"logprobs": 2, "n": 2},
    "logprobs-stop": says("one two END", logprobs=1, stop=["END"]),
    "logprobs-emoji": says("🙂 漢字", logprobs=1),
    "logprobs-schema": {"logprobs": 1, "guided_json": SCHEMA, "max_tokens": 60},
    "logprobs-ignore-eos": {"logprobs": 0, "ignore_eos": True, "max_tokens": 10},
    "token-ids": {"return_token_ids": True},
    "token-ids-n-2": {"return_token_ids": True, "n": 2},
    "token-ids-stop": says("one two END", return_token_ids=True, stop=["END"]),
    "token-ids-emoji": says("🙂 漢字", return_token_ids=True),
    "token-ids-logprobs": {"return_token_ids": True, "logprobs": 1},
    "token-ids-usage": {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True,
        "continuous_usage_stats": True}},
    "suffix-empty": {"suffix": ""},
}  # fmt: skip
OWN_MORE: dict[str, Callable[[Answer], object]] = {
    "echo-stop": is_text(PROMPT + "one "),
    "logprobs-stop": is_text("one two "),
    "logprobs-emoji": is_text("🙂 漢字"),
    "token-ids-stop": is_text("one two "),
    "token-ids-emoji": is_text("🙂 漢字"),
}


def num_prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def check(answer: Answer) -> None:
    """A completion, or its events."""
    asked = answer.case.asked
    each, prompts = asked.get("n") or 1, num_prompts(asked["prompt"])
    said = answer.said = [Said() for _ in range(each * prompts)]
    bodies = events_of(answer) if answer.is_stream else [answer.json]
    for body in bodies:
        strictly(StreamedCompletion if answer.is_stream else WholeCompletion, body)
        assert (body["model"], body["id"]) == (POOL, answer.id)
        check_tier(answer, body.get("service_tier"))
        for choice in body["choices"]:
            _add(said[choice["index"]], choice, asked)
    if not answer.is_stream:
        answer.usage = answer.json["usage"]
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(len(said)))
    else:
        check_counts(answer, bodies)
    check_facts(answer, len(said), max(each, asked.get("best_of") or 0) * prompts)
    _check_echo(answer, each)
    _check_token_ids(answer, each)
    for one in said:
        _check_offsets(one)
        check_prompt(asked, one.prompt_logprobs)


def _add(said: Said, choice: dict[str, Any], asked: dict[str, Any]) -> None:
    assert said.finish is None, "nothing follows the end of a choice"
    said.finish = choice["finish_reason"]
    said.text += choice["text"]
    assert ("token_ids" in choice) == bool(asked.get("return_token_ids"))
    if "token_ids" in choice:
        said.token_ids = [*(said.token_ids or []), *choice["token_ids"]]
        if "prompt_token_ids" in choice:
            assert said.prompt_token_ids is None
            said.prompt_token_ids = choice["prompt_token_ids"]
    if (told := choice.get("logprobs")) is not None:
        said.has_logprobs = True
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        for token, logprob, top, at in zip(*(told[name] for name in names), strict=True):
            said.tokens.append({"token": token, "logprob": logprob, "top": list(top or ()), "at": at})
    if (prompt := choice.get("prompt_logprobs")) is not None:
        assert said.prompt_logprobs is None, "they are told once"
        said.prompt_logprobs = prompt


def _check_offsets(said: Said) -> None:
    """Each token that is neither torn nor special stands where its offset says; of one that a stop string cut, what is left."""
    offsets = [one["at"] for one in said.tokens]
    assert offsets == sorted(offsets)
    for one in said.tokens:
        if "\ufffd" not in one["token"] and not one["token"].startswith("<|"):
            assert one["token"].startswith(said.text[one["at"] : one["at"] + len(one["token"])])


def _check_echo(answer: Answer, each: int) -> None:
    prompt = answer.case.asked["prompt"]
    if not answer.case.asked.get("echo") or not isinstance(prompt, str | list):
        return
    texts = [prompt] if isinstance(prompt, str) else [one for one in prompt if isinstance(one, str)]
    for place, text in enumerate(texts):
        assert all(one.text.startswith(text) for one in answer.said[place * each : (place + 1) * each])


def _check_token_ids(answer: Answer, each: int) -> None:
    if not answer.case.asked.get("return_token_ids"):
        return
    assert all(one.token_ids and one.prompt_token_ids for one in answer.said)
    if answer.usage is not None and not answer.case.asked.get("best_of"):
        assert sum(len(one.token_ids or []) for one in answer.said) == answer.usage["completion_tokens"]
        assert sum(len(one.prompt_token_ids or []) for one in answer.said[::each]) == answer.usage["prompt_tokens"]


CASES: list[Case] = both("completion", PATH, {**COMMON, **PROMPTS, **OWN}, BASE, check, {**MORE, **OWN_MORE})
