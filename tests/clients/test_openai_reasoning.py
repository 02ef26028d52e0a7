"""Reasoning, read by a response template of one's own and told apart from the answer, as clients of reasoning models expect."""

from __future__ import annotations

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

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f"}}]
REASONING = {
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close": "<|end|>"}, "thinking": {"open": "<think>", "close_pattern": "</think>\\n*"}},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reasons(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("reasons")
    (folder / "reasons.json").write_text(json.dumps(REASONING))
    overrides = [f"pools.{POOL}.engine=torch", f"pools.{POOL}.response_template={folder / 'reasons.json'}"]
    async with serving(default_redis_server, folder, *overrides) as served:
        yield served


async def test_reasoning_is_told_apart(reasons: Served) -> None:
    extra: Any = {"structured_outputs": {"choice": ["<think>It is Rome.</think>\n\nSunny."]}}
    asked: Any = {"model": POOL, "messages": QUESTION, "max_tokens": 100}
    async with reasons.openai() as client:
        message = (await client.chat.completions.create(**asked, extra_body=extra)).choices[0].message
        assert (message.content, message.reasoning_content) == ("Sunny.", "It is Rome.")  # type: ignore[attr-defined]
        said = {"content": "", "reasoning_content": ""}
        async for chunk in await client.chat.completions.create(**asked, extra_body=extra, stream=True):
            for field in said:
                said[field] += getattr(chunk.choices[0].delta, field, None) or ""
        assert said == {"content": "Sunny.", "reasoning_content": "It is Rome."}
        hidden = await client.chat.completions.create(**asked, extra_body=extra | {"include_reasoning": False})
        assert not hasattr(hidden.choices[0].message, "reasoning_content")
        with pytest.raises(openai.BadRequestError, match="response_template"):
            await client.chat.completions.create(**asked, tools=TOOLS)
