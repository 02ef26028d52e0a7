"""Structured answers of the built-in model on the torch engine, through the whole system, also when a worker dies in mid answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL

TORCH = f"pools.{POOL}.engine=torch"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "kind": {"enum": ["story", "poem"]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 150, "maxItems": 160},
    },
    "required": ["title", "kind", "numbers"],
    "additionalProperties": False,
}  # fmt: skip


def asked(**fields: Any) -> dict[str, Any]:
    return {
        "model": POOL,
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "story", "schema": SCHEMA}},
        "max_tokens": 1200,
        "n": 2,
        "seed": 7,
        "stream": True,
    } | fields


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            yield event


async def told(response: httpx.Response, n: int = 2) -> list[tuple[str, str | None]]:
    """Text and finish reason of each choice."""
    texts, reasons = [""] * n, [None] * n
    async for event in events(response):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"]
    return list(zip(texts, reasons, strict=True))


async def answer(served: Served, **fields: Any) -> list[tuple[str, str | None]]:
    async with served.http() as http, http.stream("POST", "/v1/chat/completions", json=asked(**fields)) as response:
        assert response.status_code == 200, await response.aread()
        return await told(response)


async def test_json_is_streamed_that_parses_and_follows_its_schema(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, TORCH) as served:
        answers = await asyncio.gather(*(answer(served, seed=seed, ignore_eos=seed % 2 == 1) for seed in range(4)))
        texts = [text for choices in answers for text, reason in choices if reason == "stop"]
        assert len(texts) == 8
        assert len(set(texts)) > 4
        for text in texts:
            jsonschema_rs.validate(SCHEMA, json.loads(text))
        cut = await answer(served, stop=['","kind":'], seed=0)
        assert cut == [(whole.split('","kind":')[0], "stop") for whole, _ in answers[0]]
        await served.system.until(served.rests, 10)


@pytest.mark.faults
async def test_a_decode_worker_dies_in_mid_answer_and_the_json_goes_on(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, TORCH, "worker.lease_s=2", stages="prefill") as served:
        system = served.system
        doomed = await system.worker("decode")
        whole = await answer(served)
        async with served.http() as http, http.stream("POST", "/v1/chat/completions", json=asked()) as response:
            request_id = response.headers["x-baton-request-id"]
            await system.until(lambda: system.logged(request_id, 40), 20)
            doomed.kill()
            got = int(await system.connection.command("STRLEN", system.keys.log(request_id, 0))) // 4
            await system.worker("decode")
            assert await told(response) == whole
        assert 40 <= got < 300, "it died in the middle"
        for text, reason in whole:
            assert reason == "stop"
            jsonschema_rs.validate(SCHEMA, json.loads(text))
        await system.until(served.rests, 10)
