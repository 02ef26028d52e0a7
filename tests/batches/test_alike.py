"""A line of a batch is answered as its body is over HTTP: the same bytes but for ids and times, the same errors."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from pipeline.errors import InvalidRequest
from pipeline.redis_server import RedisServer
from pipeline.surface.endpoints import ENDPOINTS
from tests.batches.running import CHATS, TEXTS, Batching, batching
from tests.system import POOL

EMBEDDINGS, RESPONSES = "/v1/embeddings", "/v1/responses"
SETTINGS = (f"pools.{POOL}.engine=torch", f"pools.{POOL}.embeddings=true", f"pools.{POOL}.matryoshka=true")
HELLO = [{"role": "user", "content": "Tell me a story."}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

BODIES: dict[str, list[dict[str, Any]]] = {
    CHATS: [
        {"messages": HELLO},
        {"messages": HELLO, "n": 3, "seed": 5, "temperature": 0.9, "logprobs": True, "top_logprobs": 2},
        {"messages": HELLO, "stop": ["e"], "tools": [TOOL]},
        {"messages": HELLO, "response_format": {"type": "json_object"}},
    ],
    TEXTS: [
        {"prompt": "Once"},
        {"prompt": ["Once", "upon a time"], "echo": True, "n": 2, "logprobs": 1},
        {"prompt": [[5, 6, 7]], "return_token_ids": True},
    ],
    RESPONSES: [
        {"input": "Tell me a story."},
        {"input": HELLO, "instructions": "Be kind.", "metadata": {"a": "b"}},
    ],
    EMBEDDINGS: [
        {"input": "A runner."},
        {"input": ["one", "two words", "x" * 200], "encoding_format": "base64", "dimensions": 64},
    ],
}
# what a body asks that is treated as a line is
AS_BATCHES: dict[str, dict[str, Any]] = {
    CHATS: {},
    TEXTS: {},
    RESPONSES: {"service_tier": "flex", "store": False},
    EMBEDDINGS: {},
}
FAILS: dict[str, dict[str, Any]] = {  # what is only found when a line runs
    CHATS: {"messages": [{"role": "user", "content": "long " * 9000}]},
    TEXTS: {"prompt": "long " * 9000},
    RESPONSES: {"input": "long " * 9000},
    EMBEDDINGS: {"input": "x", "dimensions": 100_000},
}


def body(endpoint: str, fields: dict[str, Any]) -> dict[str, Any]:
    limits = {CHATS: {"max_tokens": 8, "temperature": 0}, TEXTS: {"max_tokens": 8, "temperature": 0}}
    limits[RESPONSES] = {"max_output_tokens": 16, "temperature": 0}
    return {"model": POOL, **limits.get(endpoint, {}), **fields}


def without_ids(answer: object) -> str:
    """A body without what is another one each time."""
    text = json.dumps(answer)
    text = re.sub(r'"(id|call_id|request_id)": "[^"]*"', r'"\1": ""', text)
    text = re.sub(r'"(created|created_at|completed_at|cached_tokens)": [0-9.]+', r'"\1": 0', text)
    return re.sub(r"-?\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.3f}", text)  # of whatever shared the step


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Batching]:
    folder = tmp_path_factory.mktemp("alike")
    async with batching(default_redis_server, folder, *SETTINGS, stages="prefill decode embed") as it:
        yield it


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("endpoint", BODIES)
async def test_a_line_is_answered_as_its_body_is_over_http(it: Batching, endpoint: str) -> None:
    bodies = [body(endpoint, fields) for fields in [*BODIES[endpoint], FAILS[endpoint]]]
    lines = [{"custom_id": str(at), "method": "POST", "url": endpoint, "body": one} for at, one in enumerate(bodies)]
    made = await it.batch(lines, endpoint)
    batch = await it.ended(made.id)
    assert batch.status == "completed", batch
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(bodies) - 1, 1)
    output, errors = await it.lines(batch.output_file_id), await it.lines(batch.error_file_id)
    assert [line["custom_id"] for line in errors] == [str(len(bodies) - 1)]
    results = {int(line["custom_id"]): line for line in [*output, *errors]}
    tokens = 0
    async with it.served.http() as http:
        for at, one in enumerate(bodies):
            answer = await http.post(endpoint, json=one | AS_BATCHES[endpoint])
            response = results[at]["response"]
            assert response["status_code"] == answer.status_code, answer.text
            assert without_ids(response["body"]) == without_ids(answer.json())
            tokens += answer.json().get("usage", {}).get("total_tokens", 0)
    assert batch.usage.total_tokens == tokens
    await it.served.system.until(it.served.rests, 10)


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (CHATS, {"messages": HELLO, "stream": True}, "stream"),
        (TEXTS, {"prompt": "x", "stream": True}, "stream"),
        (RESPONSES, {"input": "x", "stream": True}, "stream"),
        (RESPONSES, {"input": "x", "background": True, "store": True}, "background"),
        (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        (CHATS, {"messages": []}, "messages"),
        (EMBEDDINGS, {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        (TEXTS, {}, "prompt"),
    ],
)
def test_what_a_line_cannot_ask_is_refused_when_it_is_read(endpoint: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS[endpoint].read(json.dumps({"model": "m", **fields}).encode())
    assert str(caught.value.param).startswith(param)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_nothing_of_a_response_is_stored_and_every_body_names_its_model(endpoint: str) -> None:
    fields = BODIES[endpoint][0]
    read = ENDPOINTS[endpoint].read(
        json.dumps({"model": "m", "stream": False, **fields}).encode()
        if endpoint != EMBEDDINGS
        else json.dumps({"model": "m", **fields}).encode()
    )
    assert read.model == "m" and not getattr(read, "store", False)
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS[endpoint].read(json.dumps(fields).encode())
    assert caught.value.param == "model"
