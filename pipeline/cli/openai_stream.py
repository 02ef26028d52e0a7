"""One streamed chat completion, as a client sees it: HTTP, server-sent events, OpenAI's chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx

from pipeline.cli.api_calls import refusal, unreachable
from pipeline.exits import NoAnswer


class Delta(NamedTuple):
    """One chunk: its text, why the answer ended, and at the end the usage."""

    id: str
    text: str
    finish_reason: str | None
    usage: dict[str, Any] | None


async def stream_chat(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[Delta]:
    """Posts `body` to /v1/chat/completions and yields the chunks.

    Raises RequestFailed where the request is wrong and NoAnswer otherwise, with what the API said.
    """
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(http.headers, response.status_code, await response.aread())
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield _delta(json.loads(data))
    except httpx.TransportError as error:
        raise unreachable(http.base_url, error) from error
    raise NoAnswer("the stream ended without [DONE]: the answer is not complete")


def _delta(chunk: dict[str, Any]) -> Delta:
    if "error" in chunk:
        raise NoAnswer(f"the answer broke off: {chunk['error'].get('message', chunk['error'])}")
    choice = chunk["choices"][0] if chunk["choices"] else {}
    text = choice.get("delta", {}).get("content") or ""
    return Delta(chunk["id"], text, choice.get("finish_reason"), chunk.get("usage"))
