"""What only vLLM serves, over HTTP and through both workers: what a client asks for is what it gets, also when a worker dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL
from tests.with_vllm.settings import VLLM, requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

HELLO: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 12, "maxItems": 12}},
    "required": ["words"],
    "additionalProperties": False,
}  # fmt: skip
BY_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "story", "schema": SCHEMA}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    place = tmp_path_factory.mktemp("served")
    async with serving(default_redis_server, place, *VLLM, "worker.lease_s=3") as served:
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
