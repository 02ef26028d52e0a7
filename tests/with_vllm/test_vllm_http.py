"""What only vLLM serves, over HTTP and through both workers: what a client asks for is what it gets, also when a worker dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from pipeline.kv_events import FIELD, BlocksCleared, BlocksStored, decode
from pipeline.protocol import pack_tokens, unpack_tokens
from pipeline.redis_server import RedisServer
from tests.clients.running import run
from tests.serving import Served, serving
from tests.system import POOL
from tests.with_vllm.adapters import write_adapter
from tests.with_vllm.settings import VLLM, requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

HELLO: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 12, "maxItems": 12}},
    "required": ["words"],
    "additionalProperties": False,
}  # fmt: skip
KV_EVENTS = "engine.vllm.kv_events=true"
# of tests/clients/programs
PROGRAMS = (
    "openai_chat.py", "openai_tools.py", "openai_parse.py", "openai_responses.py", "openai_texts.py", "anthropic_messages.py",
)  # fmt: skip
BY_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "story", "schema": SCHEMA}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    place = tmp_path_factory.mktemp("served")
    loras = f"pools.{POOL}.loras=story={write_adapter(place / 'story', 1, 0.3)}"
    async with serving(default_redis_server, place, *VLLM, loras, "worker.lease_s=3", KV_EVENTS) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served.openai() as client:
        yield client


async def test_an_answer_follows_its_schema(client: openai.AsyncOpenAI) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0}):
        answer = await client.chat.completions.create(
            model=POOL, messages=HELLO, max_tokens=800, response_format=BY_SCHEMA, **options
        )  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "stop"
        assert len(json.loads(answer.choices[0].message.content)["words"]) == 12


async def test_a_decode_that_dies_leaves_an_answer_that_follows_its_schema(
    served: Served, client: openai.AsyncOpenAI
) -> None:
    asked: dict[str, Any] = {
        "model": POOL, "messages": HELLO, "max_tokens": 800, "response_format": BY_SCHEMA, "seed": 7, "temperature": 1.0
    }  # fmt: skip
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True)
    pieces: list[str] = []
    decode = next(process for process in served.system.processes if "decode" in process.args)  # type: ignore[operator]
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == 10:
            os.kill(decode.pid, signal.SIGKILL)
            starting = asyncio.create_task(served.system.worker("decode"))
    await starting
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(json.loads("".join(pieces))["words"]) == 12


ASKED: dict[str, Any] = {"model": POOL, "max_tokens": 30, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_an_echo_has_the_prompt_s_log_probabilities_whole_and_streamed(
    client: openai.AsyncOpenAI, max_tokens: int
) -> None:
    """As evaluation harnesses ask for them."""
    asked = ASKED | {"prompt": "Once there was a fox", "max_tokens": max_tokens, "logprobs": 1, "echo": True}
    whole = (await client.completions.create(**asked)).choices[0]
    assert whole.text.startswith("Once there was a fox")
    told = whole.logprobs.token_logprobs
    assert told[0] is None
    assert all(
        one <= max(top.values()) <= 0 for one, top in zip(told[1:], whole.logprobs.top_logprobs[1:], strict=True)
    )
    streamed = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
    again = [value for choice in streamed if choice.logprobs for value in choice.logprobs.token_logprobs]
    assert again[1:] == pytest.approx(told[1:], abs=2e-3)
    assert "".join(choice.text for choice in streamed) == whole.text


async def test_a_message_has_its_log_probabilities_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    asked = ASKED | {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**asked)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in content).decode().startswith(whole.choices[0].message.content)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    stream = await client.chat.completions.create(**asked, stream=True)
    told = [chunk.choices[0].logprobs async for chunk in stream]
    streamed = [entry for part in told if part is not None for entry in part.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=2e-3)


async def test_a_text_has_its_log_probabilities_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    asked = ASKED | {"prompt": "Once upon a time", "logprobs": 3, "stop": ["."]}
    whole = await client.completions.create(**asked)
    told = whole.choices[0].logprobs
    assert len(told.tokens) == whole.usage.completion_tokens
    assert all(
        token in likely and len(likely) in (3, 4) for token, likely in zip(told.tokens, told.top_logprobs, strict=True)
    )
    stream = await client.completions.create(**asked, stream=True)
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    for field in ("tokens", "text_offset"):
        assert [one for part in parts if part for one in getattr(part, field)] == getattr(told, field)


async def test_a_stream_goes_on_with_its_log_probabilities_on_another_connection_when_its_decode_has_died(
    served: Served,
) -> None:
    body = ASKED | {
        "messages": HELLO,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "max_tokens": 200,
        "ignore_eos": True,
    }
    async with served.http() as http:
        plain = await events_of_text(http, body)
        seen: list[str] = []
        async with http.stream(
            "POST", "/v1/chat/completions", json=body, headers={"X-Baton-Resumable": "true"}
        ) as response:
            request_id = response.headers["x-baton-request-id"]
            async for line in response.aiter_lines():
                seen.append(line)
                if len(seen) > 90:
                    break
        decode = [process for process in served.system.processes if "decode" in process.args][-1]  # type: ignore[operator]
        os.kill(decode.pid, signal.SIGKILL)
        await served.system.worker("decode")
        at = max(number for number, line in enumerate(seen) if line.startswith("id: "))
        last = [line for line in seen[:at] if line.startswith("id: ")][-1].removeprefix("id: ")
        rest = await http.get(f"/v1/streams/{request_id}", headers={"Last-Event-ID": last})
        shown = (await http.get(f"/v1/requests/{request_id}")).json()
    entries = content_of(seen[:at]) + content_of(rest.text.splitlines())
    assert len(entries) == 200
    for other in (content_of(plain.splitlines()), shown["choices"][0]["logprobs"]["content"]):
        assert [entry["token"] for entry in entries] == [entry["token"] for entry in other]
        assert [entry["logprob"] for entry in entries] == pytest.approx([entry["logprob"] for entry in other], abs=2e-3)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_program_of_a_user_gets_what_it_expects(served: Served, program: str) -> None:
    await run(program, "tools", served.url)
    await served.system.until(served.rests, 20)


async def test_an_adapter_is_a_model_of_its_own(served: Served, client: openai.AsyncOpenAI) -> None:
    listed = [(model.id, getattr(model, "parent", None)) async for model in client.models.list()]
    assert listed == [(POOL, None), ("story", POOL)]
    assert (await client.models.retrieve("story")).id == "story"
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 30, "temperature": 0}
    base, story = [await client.chat.completions.create(model=model, **asked) for model in (POOL, "story")]
    assert (base.model, story.model) == (POOL, "story")
    assert base.choices[0].message.content != story.choices[0].message.content
    assert (await client.chat.completions.create(model="story", **asked)).choices == story.choices
    await served.system.until(served.system.rests, 20)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="history", **asked)


async def test_the_workers_tell_what_their_prefix_caches_hold(served: Served, client: openai.AsyncOpenAI) -> None:
    await client.completions.create(model=POOL, prompt=list(range(100, 200)), max_tokens=4)

    async def told() -> bool:
        rows = await served.system.connection.command("XRANGE", served.system.keys.kv_events(), "-", "+")
        entries = [entry for _, fields in rows if (entry := decode(fields[FIELD.encode()])) is not None]
        numbers: dict[str, int] = {}
        for entry in entries:
            assert entry.number == numbers.get(entry.worker, 0)
            assert (entry.events[0] == BlocksCleared()) == (entry.number == 0)
            numbers[entry.worker] = entry.number + len(entry.events)
        stored = {
            entry.worker: unpack_tokens(event.tokens)
            for entry in entries
            for event in entry.events
            if isinstance(event, BlocksStored) and event.tokens.startswith(pack_tokens(range(100, 132)))
        }
        alive = [name for stage in ("prefill", "decode") for name in await served.system.alive(stage)]
        return len(stored) == 2 and stored.keys() <= set(alive)

    await served.system.until(told, 20)


async def events_of_text(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return (await http.post("/v1/chat/completions", json=body)).text


def content_of(lines: list[str]) -> list[dict[str, Any]]:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not [event["error"] for event in events if "error" in event]
    return [entry for event in events for entry in (event["choices"][0].get("logprobs") or {"content": []})["content"]]
