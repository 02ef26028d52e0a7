"""`/v1/messages` over raw HTTP: framing, pings, errors before and after the headers, other replicas, what is left behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/messages"
ASKED: Any = {"model": POOL, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
LONG: Any = ASKED | {"max_tokens": 3000, "stream": True}
FOR_CLIENT: Any = {name: ASKED[name] for name in ("model", "messages")}  # it has no argument for a temperature any more
TOOL = {"name": "f", "input_schema": {"type": "object"}}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """Two replicas; slow tokens and quick pings."""
    async with serving(
        default_redis_server, tmp_path_factory.mktemp("served"), "engine.mock.decode_base_ms=60", "api.ping_s=0.02",
        "api.body_limit_bytes=20000",
    ) as served:  # fmt: skip
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=await served.system.api(), timeout=60) as http:
        yield http


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with served.http() as http:
        yield http


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream without its pings: each has a name, which is its type, and one line of data."""
    assert b"\r" not in data
    blocks = data.replace(PING, b"").split(b"\n\n")
    assert blocks.pop() == b""
    found = []
    for block in blocks:
        name, value = block.split(b"\n")
        found.append(json.loads(value.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    return found


async def read(http: httpx.AsyncClient, body: Any, **headers: str) -> tuple[httpx.Response, bytes]:
    async with http.stream("POST", PATH, json=body, headers=headers) as response:
        return response, await events_of(response)


async def test_pings_are_events_and_nothing_follows_the_stop(http: httpx.AsyncClient) -> None:
    response, data = await read(http, ASKED | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert data.count(PING) > 3
    found = events(data)
    assert found[0]["message"]["id"] == f"msg_{response.headers['x-baton-request-id']}"
    assert [found[0]["type"], found[-1]["type"]] == ["message_start", "message_stop"]
    assert found[-2]["usage"]["output_tokens"] == 8


async def test_a_message_is_read_on_every_replica(http: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    text = (await http.post(PATH, json=ASKED)).json()["content"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    _, data = await read(http, ASKED | {"stream": True, "stop_sequences": ["never said", stop]})
    found = events(data)
    assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    request_id = found[0]["message"]["id"]
    again = await other.get(f"/v1/streams/{request_id}")
    assert events(again.content) == found
    record = (await other.get(f"/v1/requests/{request_id}")).json()
    assert (record["kind"], record["state"]) == ("message", "done")
    assert record["choices"][0]["message"]["role"] == "assistant"
    refused = await other.get(f"/v1/streams/{request_id}", headers={"Last-Event-ID": "1"})
    assert refused.status_code == 400 and "no ids" in refused.json()["error"]["message"]


async def test_the_same_key_is_the_same_message(http: httpx.AsyncClient) -> None:
    first, second = [await http.post(PATH, json=ASKED, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert first.json() == second.json()
    clash = await http.post(PATH, json=ASKED | {"max_tokens": 9}, headers={"Idempotency-Key": "k"})
    assert (clash.status_code, clash.json()["error"]["type"]) == (409, "conflict_error")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "word"),
    [
        ("POST", PATH, b"{", {}, 400, "invalid_request_error"),
        ("POST", PATH, b"{}", {}, 400, "invalid_request_error"),
        ("POST", PATH, json.dumps(ASKED | {"model": "nowhere"}).encode(), {}, 404, "not_found_error"),
        ("POST", PATH, b"x" * 30_000, {}, 413, "request_too_large"),
        ("POST", PATH, b"x", {"content-type": "text/plain"}, 415, "invalid_request_error"),
        ("GET", PATH, b"", {}, 405, "invalid_request_error"),
        ("POST", f"{PATH}/batches", b"", {}, 404, "not_found_error"),
        ("POST", f"{PATH}/count_tokens", b"{}", {}, 400, "invalid_request_error"),
    ],
)
async def test_errors_have_anthropics_shape(
    http: httpx.AsyncClient, method: str, path: str, body: bytes, headers: dict[str, str], status: int, word: str
) -> None:
    asked = {"content-type": "application/json", "x-request-id": "mine", "anthropic-version": "2023-06-01"} | headers
    response = await http.request(method, path, content=body, headers=asked)
    assert response.status_code == status
    said = response.json()
    assert (said["type"], said["error"]["type"], said["request_id"]) == ("error", word, "mine")
    assert set(said) == {"type", "error", "request_id"} and set(said["error"]) == {"type", "message"}
    assert response.headers["request-id"] == "mine"


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "output_config.format"),
    ],
)
async def test_what_needs_a_grammar_is_refused_where_there_are_none(
    http: httpx.AsyncClient, asked: dict[str, Any], name: str
) -> None:
    response = await http.post(PATH, json=ASKED | asked)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{name} is not supported")


async def test_other_paths_keep_openais_shape(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/nothing")
    assert set(response.json()) == {"error"} and "request-id" not in response.headers


async def test_an_error_after_the_headers_is_an_event(served: Served, http: httpx.AsyncClient) -> None:
    _, data = await read(http, LONG, **{"X-Request-Timeout": "1"})
    assert events(data)[-1]["error"]["type"] == "timeout_error"
    assert b"[DONE]" not in data
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        late = {"X-Request-Timeout": "1"}
        stream = await client.messages.create(**FOR_CLIENT, max_tokens=3000, stream=True, extra_headers=late)
        with pytest.raises(anthropic.APIStatusError, match="time ran out"):
            async for _ in stream:
                pass


async def test_a_client_that_leaves_leaves_nothing(served: Served, http: httpx.AsyncClient) -> None:
    before = await served.ended("cancelled")
    async with http.stream("POST", PATH, json=LONG) as response:
        await anext(response.aiter_raw())

    async def cancelled() -> bool:
        return await served.ended("cancelled") == before + 1 and await served.rests()

    await served.system.until(cancelled)


async def test_counting_queues_nothing(served: Served, http: httpx.AsyncClient) -> None:
    before = await served.system.counter("ended:done")
    counted = (await http.post(f"{PATH}/count_tokens", json=FOR_CLIENT)).json()
    assert await served.rests() and await served.system.counter("ended:done") == before
    usage = (await http.post(PATH, json=ASKED)).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
