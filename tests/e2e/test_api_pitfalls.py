"""What broke clients of other servers, tried on this one: pings, framing, silent ends, shutdown, disconnects, waiting."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from pipeline.control import ControlClient
from pipeline.redis_server import RedisServer
from tests.serving import STREAM, Served, events_of, serving
from tests.system import POOL

CHAT = "/v1/chat/completions"
SLOW = "engine.mock.decode_base_ms=60"
FEWER = "engine.mock.max_num_seqs=2"  # choices than the API believes, which has the default
HELLO: Any = STREAM["messages"]


def events(data: bytes) -> list[Any]:
    """The events of a stream as a strict client sees them: fields only `data`, never empty, JSON until [DONE]."""
    assert b"\r" not in data
    blocks = data.replace(b": ping\n", b"").split(b"\n\n")
    assert blocks.pop() == b"", "the stream ends with a blank line"
    assert all(block.startswith(b"data: ") and len(block) > 6 and b"\n" not in block for block in blocks)
    assert blocks.pop() == b"data: [DONE]"
    return [json.loads(block[6:]) for block in blocks]


async def read_some(stream: AsyncIterator[bytes], least: int = 400) -> bytes:
    data = b""
    while len(data) < least:
        data += await anext(stream)
    return data


@pytest.fixture
def server(default_redis_server: RedisServer) -> RedisServer:
    return default_redis_server


async def test_pings_do_not_break_a_stream(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW, "api.ping_s=0.02") as served:
        async with served.http() as http, http.stream("POST", CHAT, json=STREAM | {"max_tokens": 8}) as response:
            headers = response.headers
            data = await events_of(response)
        assert data.count(b": ping\n") > 3
        assert b": ping\n\n" not in data
        assert len(events(data)) >= 3
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-accel-buffering"] == "no"
        assert "no-store" in headers["cache-control"]
        async with served.openai() as client:
            stream = await client.chat.completions.create(model=POOL, messages=HELLO, max_tokens=8, stream=True)
            assert [chunk.choices[0].finish_reason async for chunk in stream][-1] is not None


async def test_live_streams_finish_after_sigterm(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW, "api.shutdown_grace_s=20") as served:
        api = served.api
        async with served.http() as http, http.stream("POST", CHAT, json=long_stream(40)) as response:
            stream = response.aiter_raw()
            data = await read_some(stream)
            api.send_signal(signal.SIGTERM)
            data += b"".join([part async for part in stream])
        *_, last = events(data)
        assert last["choices"][0]["finish_reason"] == "length"
        assert await asyncio.to_thread(api.wait, 20) == 0
        assert await served.ended("done") == 1


async def test_after_the_grace_streams_end_with_an_error_and_requests_are_cancelled(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, SLOW, "api.shutdown_grace_s=0.5") as served:
        api = served.api
        async with served.http() as http:
            whole = asyncio.create_task(http.post(CHAT, json=long_stream(5000) | {"stream": False}))
            async with http.stream("POST", CHAT, json=long_stream(5000)) as response:
                stream = response.aiter_raw()
                data = await read_some(stream)
                await served.system.until(lambda: served.running(2))
                api.send_signal(signal.SIGTERM)
                data += b"".join([part async for part in stream])
            answer = await whole
        *_, last = events(data)
        assert last["error"]["code"] == "draining"
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"]
        assert await asyncio.to_thread(api.wait, 20) == 0
        assert await served.ended("cancelled") == 2
        await served.system.until(served.rests, 10)
        assert "Traceback" not in served.api_log()
        assert "leaving" in served.api_log()
        assert "CTRL+C" not in served.api_log()


async def test_the_official_client_raises_when_a_stream_ends_early(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW, "api.shutdown_grace_s=0.2") as served, served.openai() as client:
        extra = {"ignore_eos": True, "min_tokens": 5000}
        stream = await client.chat.completions.create(
            model=POOL, messages=HELLO, max_tokens=5000, stream=True, extra_body=extra
        )
        with pytest.raises(openai.APIError, match="shut down"):
            async for _ in stream:
                served.api.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_request(server: RedisServer, tmp_path: Path, stream: bool) -> None:
    async with serving(server, tmp_path, SLOW) as served:
        async with served.http() as http:
            asking = asyncio.create_task(read_until_cut(http, long_stream(5000) | {"stream": stream}))
            await served.system.until(lambda: served.running(1))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await served.system.until(lambda: cancelled(served, 1), 10)
        await served.system.until(served.rests, 10)
        assert "client disconnected" in served.api_log()
        assert "Traceback" not in served.api_log()


async def read_until_cut(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with http.stream("POST", CHAT, json=body) as response:
        async for _ in response.aiter_raw():
            pass


async def cancelled(served: Served, count: int) -> bool:
    return await served.ended("cancelled") == count


async def test_a_client_that_leaves_while_its_request_waits_cancels_it(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "api.headers_after_s=60", stages="") as served:
        async with served.http() as http:
            asking = asyncio.create_task(read_until_cut(http, STREAM))
            await served.system.until(lambda: waiting(served, 1))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await served.system.until(lambda: cancelled(served, 1), 10)
        assert await served.system.counter("waiting:prefill:default") == 0


async def waiting(served: Served, count: int) -> bool:
    return await served.system.counter("waiting:prefill:default") == count


async def test_a_full_queue_is_a_status_with_retry_after(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "queue.max_waiting_tasks=1", stages="") as served, served.http() as http:
        first = asyncio.create_task(read_until_cut(http, STREAM))
        await served.system.until(lambda: waiting(served, 1))
        for stream in (True, False):
            response = await http.post(CHAT, json=STREAM | {"stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
            assert 1 <= int(response.headers["retry-after"]) <= 120
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:
            with pytest.raises(anthropic.APIStatusError) as raised:
                await client.messages.create(model=POOL, messages=HELLO, max_tokens=1)
        assert (raised.value.status_code, raised.value.type) == (529, "overloaded_error")
        assert raised.value.response.headers["retry-after"]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_what_fails_before_the_first_token_is_a_status(server: RedisServer, tmp_path: Path) -> None:
    """Workers that run fewer choices at once than the API believes."""
    async with serving(server, tmp_path, stages="") as served, served.http() as http:
        await asyncio.gather(*(served.system.worker(stage, FEWER) for stage in ("prefill", "decode")))
        for stream in (True, False):
            response = await http.post(CHAT, json=STREAM | {"stream": stream, "n": 3})
            assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")
            assert response.headers["x-should-retry"] == "false"
        assert (await http.post(CHAT, json=STREAM | {"max_tokens": 2})).status_code == 200


async def test_what_fails_after_the_headers_is_an_error_event(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "api.headers_after_s=0.05", stages="") as served, served.http() as http:
        async with http.stream("POST", CHAT, json=STREAM | {"n": 3}) as response:
            assert response.status_code == 200  # nobody has looked at the request yet
            await served.system.worker("prefill", FEWER)
            data = await events_of(response)
        *opening, last = events(data)
        assert [chunk["choices"][0]["delta"]["role"] for chunk in opening] == ["assistant"] * 3
        assert last["error"]["code"] == "request_failed"


@pytest.mark.parametrize(("headers_after_s", "is_status"), [(30, True), (0.05, False)])
async def test_a_deadline_is_a_504_before_the_headers_and_an_event_after(
    server: RedisServer, tmp_path: Path, headers_after_s: float, is_status: bool
) -> None:
    overrides = ("queue.deadline_s=1", f"api.headers_after_s={headers_after_s}")
    async with serving(server, tmp_path, *overrides, stages="") as served, served.http() as http:
        response = await http.post(CHAT, json=STREAM)
        if is_status:
            assert (response.status_code, response.json()["error"]["code"]) == (504, "queue_timeout")
        else:
            assert response.status_code == 200
            *_, last = events(response.content)
            assert last["error"]["code"] == "queue_timeout"
        assert (await http.post(CHAT, json=STREAM | {"stream": False})).status_code == 504


async def test_redis_that_goes_away_is_told_and_seen(short_dir: Path, tmp_path: Path) -> None:
    overrides = (SLOW, "api.silence_s=0.3", "redis.timeout_s=1", "queue.deadline_s=4")  # a stream waits as long
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        async with serving(server, tmp_path, *overrides) as served, served.http() as http:
            async with http.stream("POST", CHAT, json=long_stream(5000)) as response:
                stream = response.aiter_raw()
                data = await read_some(stream)
                server.stop()
                data += b"".join([part async for part in stream])
            *_, last = events(data)
            assert last["error"]["code"] == "redis_unavailable"
            await served.system.until(lambda: has_status(http, "/ready", 503), 20)
            health = await http.get("/health")
            assert health.status_code == 503
            assert "does not answer (No such file or directory)" in health.text
            refused = await http.post(CHAT, json=STREAM)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "redis_unavailable")
            assert (await http.get("/live")).status_code == 200
            assert (await http.get("/v1/models")).status_code == 200
            for process in served.system.processes:
                process.kill()  # workers would wait for Redis


async def has_status(http: httpx.AsyncClient, path: str, status: int) -> bool:
    return (await http.get(path)).status_code == status


async def told(served: Served, words: str) -> bool:
    return words in served.api_log()


async def test_a_slow_reader_is_cut_after_the_send_timeout(server: RedisServer, tmp_path: Path) -> None:
    instant = ("engine.mock.decode_base_ms=0", "engine.mock.num_blocks=16384", "api.send_timeout_s=0.5")
    async with serving(server, tmp_path, *instant) as served:
        port = int(served.url.rsplit(":", 1)[1])
        body = json.dumps(long_stream(16_000) | {"n": 8}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.socket() as client:  # never reads, and its kernel takes little for it
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(head.encode() + body)
            await served.system.until(lambda: cancelled(served, 1), 60)
            await served.system.until(lambda: told(served, "client did not read"), 10)  # a moment after the cancel


async def test_a_body_that_does_not_come_is_a_408_and_the_end_of_its_connection(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, "api.body_timeout_s=0.5") as served:
        port = int(served.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        writer.write(head.encode() + b"{")
        async with asyncio.timeout(30):
            answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith("HTTP/1.1 408 ")
        assert "x-should-retry: true" in answer
        error = json.loads(answer.partition("\r\n\r\n")[2])["error"]
        assert (error["code"], error["type"]) == ("body_timeout", "timeout_error")
        assert error["message"] == "of the body 1 bytes came in 0.5 s, and it is not whole"


async def test_a_pool_is_listed_and_ready_without_workers_and_health_says_so(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, stages="") as served, served.http() as http:
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == [POOL]
        assert (await http.get("/ready")).status_code == 200
        health = await http.get("/health")
        assert health.status_code == 503
        assert "no decode worker" in health.text
        await served.system.worker("decode")
        await served.system.until(lambda: has_status(http, "/health", 200), 10)
        assert (await http.get("/health")).json()["status"] == "degraded"


async def test_health_tells_at_once_that_all_workers_of_a_stage_are_paused(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "worker.lease_s=60") as served, served.http() as http:
        (prefill,) = await served.system.alive("prefill")
        control = ControlClient(served.system.connection, POOL)
        await served.system.until(lambda: has_status(http, "/health", 200), 10)
        await control.ask("pause", to=[prefill], timeout_s=20)
        await served.system.until(lambda: has_status(http, "/health", 503), 10)  # a renewal comes after 15 s
        (pool,) = (await http.get("/health")).json()["pools"].values()
        assert pool["problems"] == [
            "all prefill workers are paused: requests wait until one resumes, or for their deadline"
        ]
        await control.ask("resume", to=[prefill], timeout_s=20)
        await served.system.until(lambda: has_status(http, "/health", 200), 10)


async def test_metrics_tell_requests_stages_and_pools(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path) as served, served.http() as http:
        for stream in (True, False):
            assert (await http.post(CHAT, json=STREAM | {"stream": stream, "max_tokens": 5})).status_code == 200
        await http.post(CHAT, json=STREAM | {"model": "nobody"})
        await served.system.until(
            lambda: counts(http, 'baton_ended_requests_total{pool="baton-tiny",state="done"} 2.0'), 10
        )
        text = (await http.get("/metrics")).text
    for line in (
        'baton_requests_total{kind="chat.completion",pool="baton-tiny",state="done"} 2.0',
        'baton_refusals_total{code="model_not_found"} 1.0',
        'baton_kv_recomputed_total{pool="baton-tiny",reason="gone"} 0.0',
        'baton_workers{pool="baton-tiny",role="decode"} 1.0',
        'baton_waiting_tasks{lane="default",pool="baton-tiny",stage="prefill"} 0.0',
        'baton_first_token_seconds_count{pool="baton-tiny"} 2.0',
        *(f'baton_stage_seconds_count{{pool="baton-tiny",stage="{stage}"}} 2.0' for stage in
          ("queue_prefill", "prefill", "queue_decode", "transfer", "decode")),
    ):  # fmt: skip
        assert line in text, line


async def counts(http: httpx.AsyncClient, line: str) -> bool:
    return line in (await http.get("/metrics")).text


async def test_a_taken_port_is_one_clear_line(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, stages="") as served:
        port = served.url.rsplit(":", 1)[1]
        second = served.system.spawn("api", "--set", f"api.port={port}")
        assert await asyncio.to_thread(second.wait, 30) == 3
        (line,) = (tmp_path / "api-1.log").read_text().splitlines()
        assert f"127.0.0.1:{port}" in line
        assert "api.port" in line


def long_stream(max_tokens: int) -> dict[str, Any]:
    """A stream that does not end by itself."""
    return STREAM | {"max_tokens": max_tokens, "ignore_eos": True, "min_tokens": max_tokens}
