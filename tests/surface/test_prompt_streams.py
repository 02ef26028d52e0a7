"""Several prompts in one stream: the events of all of them, one id, one usage, one end; and one fate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS: list[Any] = ["Once there was", [5, 6, 7], "A fox"]
BODY: dict[str, Any] = {"model": POOL, "prompt": PROMPTS, "max_tokens": 8, "seed": 4, "n": 2, "ignore_eos": True}
LONG = BODY | {"max_tokens": 3000, "n": 1}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(default_redis_server, tmp_path_factory.mktemp("logs"), f"pools.{POOL}.engine=torch") as it:
        yield it


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def as_client(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of OpenAI's client, which knows not all fields."""
    known = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**known, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize("more", [{}, {"echo": True, "logprobs": 1}, {"return_token_ids": True, "prompt_logprobs": 1}])
async def test_each_choice_says_what_the_whole_answer_says(served: Served, more: dict[str, Any]) -> None:
    async with served.http() as http:
        whole = (await http.post("/v1/completions", json=BODY | more)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await http.post("/v1/completions", json=BODY | more | options)
    assert answer.status_code == 200, answer.text
    assert answer.text.count("[DONE]") == 1
    assert answer.text.endswith("data: [DONE]\n\n")
    *chunks, last = events_of(answer.text)
    assert last["choices"] == []
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][field] == whole["usage"][field]
    assert {chunk["id"] for chunk in (*chunks, last)} == {f"cmpl-{answer.headers['x-baton-request-id']}"}
    said = [one for chunk in chunks for one in chunk["choices"]]
    assert {one["index"] for one in said} == set(range(6))
    for expected in whole["choices"]:
        own = [one for one in said if one["index"] == expected["index"]]
        assert "".join(one["text"] for one in own) == expected["text"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [expected["finish_reason"]]
        for name in ("tokens", "text_offset"):
            told = [value for one in own for value in (one.get("logprobs") or {}).get(name, [])]
            assert told == (expected.get("logprobs") or {}).get(name, [])
        assert [token for one in own for token in one.get("token_ids", [])] == expected.get("token_ids", [])
        assert [len(one["prompt_logprobs"]) for one in own if "prompt_logprobs" in one] == (
            [len(expected["prompt_logprobs"])] if "prompt_logprobs" in expected else []
        )


async def test_its_pieces_come_as_they_are_made(served: Served) -> None:
    """Not one prompt after the other."""
    async with served.openai() as client:
        stream = await client.completions.create(**as_client(BODY | {"max_tokens": 60}))
        order = [chunk.choices[0].index async for chunk in stream]
    last_of_first, first_of_last = len(order) - 1 - order[::-1].index(0), order.index(4)
    assert first_of_last < last_of_first


async def test_what_cannot_be_resumed_is_refused_and_nothing_begins(served: Served) -> None:
    admitted = await served.system.counter("admitted")
    async with served.http() as http:
        headers = {"X-Baton-Resumable": "true"}
        refused = await http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "X-Baton-Resumable"
        assert "cannot be resumed" in refused.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        refused = await http.post("/v1/completions", json=BODY | {"stream": True, "prompt": ["a", "b" * 30_000]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt[1]")
    assert await served.system.counter("admitted") == admitted + 3


async def test_the_first_that_fails_ends_it_for_all(served: Served) -> None:
    async with served.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        text, lines = "", answer.aiter_text()
        async for part in lines:
            text += part
            if len(events_of(text)) > 5:
                break
        await http.post(f"/v1/requests/{answer.headers['x-baton-request-id']}/cancel")
        async for part in lines:
            text += part
    assert text.endswith("data: [DONE]\n\n")
    assert "error" in events_of(text)[-1]
    assert not any("error" in event for event in events_of(text)[:-1])
    await served.system.until(served.rests, 10)


async def test_a_client_that_leaves_leaves_nothing_behind(served: Served) -> None:
    cancelled = await served.ended("cancelled")
    async with served.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        await anext(answer.aiter_bytes())
    await served.system.until(served.rests, 10)
    assert await served.ended("cancelled") == cancelled + 3
    assert "Traceback" not in served.api_log()


async def test_under_a_key_it_is_read_again_from_its_start(served: Served) -> None:
    headers = {"Idempotency-Key": "several"}
    async with served.http() as http:
        answers = [await http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers) for _ in range(2)]
    said: list[dict[int, str]] = [{}, {}]
    for texts, answer in zip(said, answers, strict=True):
        for one in (one for chunk in events_of(answer.text) for one in chunk["choices"]):
            texts[one["index"]] = texts.get(one["index"], "") + one["text"]
    assert said[0] == said[1]
    assert answers[0].headers["x-baton-request-id"] == answers[1].headers["x-baton-request-id"]


async def test_what_expires_before_it_says_anything_is_a_status(served: Served) -> None:
    async with served.http() as http:
        headers = {"X-Request-Timeout": "0.001"}
        answer = await http.post("/v1/completions", json=LONG | {"stream": True}, headers=headers)
    assert answer.status_code == 504, answer.text
    await served.system.until(served.rests, 10)


async def test_a_client_of_openai_hears_of_a_failure(served: Served) -> None:
    async with served.openai() as client, served.http() as http:
        stream = await client.completions.create(**as_client(LONG))
        with pytest.raises(openai.APIError):
            async for chunk in stream:
                await http.post(f"/v1/requests/{chunk.id}/cancel")
                await asyncio.sleep(0)
    await served.system.until(served.rests, 10)
