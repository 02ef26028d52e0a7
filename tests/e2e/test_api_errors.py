"""Bad input against a running system: a clear 4xx in OpenAI's shape, no traceback, nothing left in Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hi"}]
LIMIT_BYTES = 4_194_304
FIFTY_MB = 50_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(
        default_redis_server, tmp_path_factory.mktemp("served"), "engine.mock.max_num_seqs=100"
    ) as served:
        yield served


async def refused(served: Served, response: httpx.Response, status: int, code: str, param: str | None) -> None:
    """The answer is the error, in full shape, and Redis has no request of it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"]
    assert "Traceback" not in response.text
    assert len(response.content) < 1000
    assert await served.system.connection.command("KEYS", served.system.keys.root + "req:*") == []


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": POOL, "messages": HELLO, "max_tokens": 4} | fields


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (CHAT, {"messages": HELLO}, 400, "invalid_request", "model"),
        (CHAT, chat(messages="hi"), 400, "invalid_request", "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": 7}]), 400, "invalid_request", "messages[0].content"),
        (CHAT, chat(max_tokens=-1), 400, "invalid_request", "max_tokens"),
        (CHAT, chat(temperature=-1), 400, "invalid_request", "temperature"),
        (CHAT, chat(n="3"), 400, "invalid_request", "n"),
        (CHAT, chat(n=101), 400, "invalid_request", "n"),
        (TEXT, {"model": POOL, "prompt": ["a", "b"], "n": 101}, 400, "invalid_request", "n"),
        (CHAT, chat(seed=-(10**40)), 400, "invalid_request", "seed"),
        (CHAT, chat(audio={"voice": "x"}), 400, "unsupported_parameter", "audio"),
        (CHAT, chat(response_format={"type": "json_object"}), 400, "unsupported_parameter", "response_format"),
        (CHAT, chat(model="nobody"), 404, "model_not_found", "model"),
        (CHAT, chat(model="x" * 100_000), 404, "model_not_found", "model"),
        (CHAT, chat(max_tokens=40_000), 400, "context_length_exceeded", "messages"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": "long " * 40_000}]),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (TEXT, {"model": POOL}, 400, "invalid_request", "prompt"),
        (TEXT, {"model": POOL, "prompt": []}, 400, "invalid_request", "prompt"),
        (TEXT, {"model": POOL, "prompt": [-1]}, 400, "invalid_request", "prompt[0]"),
        (TEXT, {"model": POOL, "prompt": [5, 10**12]}, 400, "invalid_request", "prompt[1]"),
        (TEXT, {"model": POOL, "prompt": [1, "a"]}, 400, "invalid_request", "prompt[0]"),
        (TEXT, {"model": POOL, "prompt": [7] * 40_000}, 400, "context_length_exceeded", "prompt"),
        (TEXT, {"model": POOL, "prompt": "a", "suffix": "b"}, 400, "unsupported_parameter", "suffix"),
    ],
)
async def test_a_wrong_body_is_told_what_is_wrong(
    served: Served, path: str, body: dict[str, Any], status: int, code: str, param: str | None, stream: bool
) -> None:
    async with served.http() as http:
        response = await http.post(path, json=body | {"stream": stream})
        await refused(served, response, status, code, param)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'{"model": "baton-tiny", ',
        b"[1, 2]",
        b'{"model": "\xff\xfe\xfa"}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"model": NaN}',
        b"[" * 100_000,
        b"\x00" * 1000,
    ],
)
async def test_a_body_that_is_no_json_is_refused(served: Served, path: str, content: bytes) -> None:
    async with served.http() as http:
        await refused(served, await http.post(path, content=content, headers=JSON), 400, "invalid_request", None)


async def test_a_body_of_50_mb_is_refused_before_it_is_read(served: Served) -> None:
    async with served.http() as http:
        response = await http.post(CHAT, content=b"x" * FIFTY_MB, headers=JSON)
        await refused(served, response, 413, "body_too_large", None)


async def test_a_body_of_50_mb_without_declared_length_is_refused_at_the_limit(served: Served) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(FIFTY_MB // 100_000):
            yield b"x" * 100_000

    async with served.http() as http:
        response = await http.post(CHAT, content=parts(), headers=JSON)
        await refused(served, response, 413, "body_too_large", None)


async def test_a_body_at_the_limit_is_read(served: Served) -> None:
    body = json.dumps(chat(user="")).encode()
    padded = json.dumps(chat(user="u" * (LIMIT_BYTES - len(body)))).encode()
    assert len(padded) == LIMIT_BYTES
    async with served.http() as http:
        assert (await http.post(CHAT, content=padded, headers=JSON)).status_code == 200
        assert (await http.post(CHAT, content=padded + b" ", headers=JSON)).status_code == 413
    await forget_requests(served)


async def forget_requests(served: Served) -> None:
    """Ended requests stay readable for a while; the other tests want to see that theirs never came to be."""
    await served.system.until(served.rests, 10)
    for key in await served.system.connection.command("KEYS", served.system.keys.root + "req:*"):
        await served.system.connection.command("DEL", key)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("POST", CHAT, {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", CHAT, {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ("POST", CHAT, JSON | {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ("GET", CHAT, {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("POST", "/" + "x" * 5000, {}, 404, "not_found"),
        ("GET", "/v1/models/", {}, 404, "model_not_found"),
    ],
)
async def test_wrong_ways_in_are_errors_of_the_same_shape(
    served: Served, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    async with served.http() as http:
        response = await http.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
        param = "model" if code == "model_not_found" else None
        await refused(served, response, status, code, param)
        if status == 405:
            assert response.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/messages", "/v1/messages"),
        ("POST", "/responses", "/v1/responses"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/v1/v1/models/x", "/v1/models/x"),
    ],
)
async def test_a_base_url_with_too_little_or_too_much_of_v1_is_told(
    served: Served, method: str, path: str, meant: str
) -> None:
    async with served.http() as http:
        response = await http.request(method, path)
        await refused(served, response, 404, "not_found", None)
        told = response.json()["error"]["message"]
        assert told.startswith(f"there is nothing at {path}, but at {meant}: the base URL ")
        assert "ends with /v1" in told
        for other in ("/", "/v1", "/v1/v1", "/v1/v1/", "/v1/nothing", "/docs", "/v1/health"):
            assert (await http.request(method, other)).json()["error"]["message"] == f"there is nothing at {other}"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        f"/v1/models/{POOL}",
        "/v1/models/x",
        "/live",
        "/ready",
        "/health",
        "/version",
        "/openapi.json",
        "/x",
    ],
)
async def test_head_answers_as_get_does_without_the_body(served: Served, path: str) -> None:
    async with served.http() as http:
        whole, head = await http.get(path), await http.head(path)
        assert whole.content
        assert (head.status_code, head.content) == (whole.status_code, b"")
        for name in ("content-type", "content-length"):
            assert head.headers[name] == whole.headers[name]


async def test_head_of_metrics_has_no_body(served: Served) -> None:
    async with served.http() as http:
        head = await http.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == (await http.get("/metrics")).headers["content-type"]


async def test_nonsense_on_the_wire_does_not_hurt_others(served: Served) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(nonsense)
        assert b" 200 " not in await reader.read(100)
        writer.close()
        await writer.wait_closed()
    async with served.http() as http:
        assert (await http.get("/live")).status_code == 200


async def test_a_client_that_leaves_in_its_body_leaves_nothing(served: Served) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode()
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with served.http() as http:
        assert (await http.get("/live")).status_code == 200
    assert await served.system.connection.command("KEYS", served.system.keys.root + "req:*") == []


async def test_request_ids_are_echoed_and_logged_or_made(served: Served) -> None:
    async with served.http() as http:
        echoed = await http.get("/nothing", headers={"x-request-id": "mine-1"})
        assert echoed.headers["x-request-id"] == "mine-1"
        assert "mine-1" in served.api_log()
        for bad in ("x" * 200, "a\tb"):
            made = (await http.get("/live", headers={"x-request-id": bad})).headers["x-request-id"]
            assert made
            assert made != bad


async def test_no_traceback_was_written(served: Served) -> None:
    assert "Traceback" not in served.api_log()
    assert await served.system.at_rest() == {}
