"""A request after its first connection: read, looked at, cancelled, sent again; on any replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.redis_server import RedisServer
from tests.e2e.test_resume import CHAT, HELLO, RESUMABLE, TEXT, by_choice, events, last_id, resume
from tests.serving import Served, serving
from tests.system import POOL

SLOW = "engine.mock.decode_base_ms=40"
KEY = {"Idempotency-Key": "my key"}


@pytest.fixture
def server(default_redis_server: RedisServer) -> RedisServer:
    return default_redis_server


def stream(**fields: Any) -> dict[str, Any]:
    return {"model": POOL, "messages": HELLO, "stream": True, "temperature": 0, "max_tokens": 30} | fields


def long(max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A stream that does not end by itself before."""
    return stream(max_tokens=max_tokens, ignore_eos=True, min_tokens=max_tokens, **fields)


async def begin(
    http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str], least: int = 1
) -> tuple[str, bytes]:
    """Read some events of a stream, then lose the connection; the request's id and what was read."""
    data = b""
    async with http.stream("POST", CHAT, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for part in response.aiter_raw():
            data += part
            if len(events(data)) >= least:
                break
        return response.headers["x-baton-request-id"], data


async def shown(http: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    response = await http.get(f"/v1/requests/{request_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


async def has_state(http: httpx.AsyncClient, request_id: str, state: str) -> bool:
    return bool((await shown(http, request_id))["state"] == state)


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        yield http


async def test_a_killed_api_process_costs_no_token(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW) as served, served.http() as http:
        other = await served.system.api()
        body = long(60, n=2, stream_options={"include_usage": True})
        data = b""
        with contextlib.suppress(httpx.TransportError):
            async with http.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
                request_id = response.headers["x-baton-request-id"]
                async for part in response.aiter_raw():
                    data += part
                    if len(events(data)) > 20:
                        served.api.kill()
        seen = events(data)
        assert seen[-1].id is not None
        tail = await resume(other, request_id, last_id(seen))
        assert tail[-1].data == b"[DONE]"
        assert by_choice(seen + tail) == by_choice(await resume(other, request_id))
        assert json.loads(tail[-2].data)["usage"]["completion_tokens"] == 120
        assert await served.ended("done") == 1


async def test_several_readers_attach_before_the_first_token_on_any_replica(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, SLOW, "api.headers_after_s=0.05", stages="") as served, served.http() as http:
        other = await served.system.api()
        async with http.stream("POST", CHAT, json=stream(n=2), headers=RESUMABLE) as response:
            request_id = response.headers["x-baton-request-id"]
            readers = [asyncio.create_task(resume(url, request_id)) for url in (served.url, other, other)]
            async with client_of(other) as elsewhere:
                assert (await shown(elsewhere, request_id))["state"] == "queued"
            await asyncio.gather(served.system.worker("prefill"), served.system.worker("decode"))
            first = events(await response.aread())
        answers = [by_choice(first), *map(by_choice, await asyncio.gather(*readers))]
        assert all(answer == answers[0] for answer in answers)
        assert len(first) > 20


async def test_a_lost_connection_ends_a_resumable_request_only_when_it_is_cancelled(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, SLOW) as served, served.http() as http:
        other = await served.system.api()
        request_id, _ = await begin(http, long(5000), RESUMABLE, 3)
        looking = asyncio.create_task(resume(other, request_id))
        await served.system.until(lambda: served.system.logged(request_id, 30))
        assert await has_state(http, request_id, "running")
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await served.system.until(lambda: served.system.logged(request_id, 60))
        assert await has_state(http, request_id, "running")
        async with client_of(other) as elsewhere:
            reading = asyncio.create_task(resume(served.url, request_id))
            for _ in range(2):
                answer = await elsewhere.post(f"/v1/requests/{request_id}/cancel")
                assert answer.status_code == 200
                assert answer.json() == {
                    "id": request_id, "object": "request", "state": "cancelled", "reason": "cancelled by its client"
                }  # fmt: skip
        *_, error, done = await reading
        assert json.loads(error.data)["error"]["code"] == "cancelled"
        assert (error.id, done.data) == (None, b"[DONE]")
        await served.system.until(served.rests, 10)


async def test_a_reader_that_fell_behind_gets_exact_ids(server: RedisServer, tmp_path: Path) -> None:
    overrides = ("engine.mock.decode_base_ms=0.2", "engine.mock.num_blocks=16384", "api.stream_buffer_items=3")
    async with serving(server, tmp_path, *overrides) as served, served.http() as http:
        other = await served.system.api()
        body = long(3000, n=2)
        async with http.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
            request_id = response.headers["x-baton-request-id"]
            await served.system.until(lambda: has_state(http, request_id, "done"))
            found = events(await response.aread())
        assert found == sorted_by_progress(found)
        assert by_choice(found) == by_choice(await resume(other, request_id))
        for seen in (1, 700, 2500, len(found) - 2):
            tail = await resume(other, request_id, last_id(found[:seen]))
            assert by_choice(found[:seen] + tail) == by_choice(found)


def sorted_by_progress(found: list[Any]) -> list[Any]:
    """Tokens sent by an event's id never go back."""
    return sorted(
        found,
        key=lambda event: (
            sum(int(mark.rstrip("te") if mark != "o" else -1) for mark in event.id.split(".")) if event.id else 10**9
        ),
    )


async def test_what_is_told_of_a_request_while_it_waits_runs_and_has_ended(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW, "api.headers_after_s=0.05", stages="") as served, served.http() as http:
        request_id, _ = await begin(http, long(50, n=2), RESUMABLE)
        waiting = await shown(http, request_id)
        assert (waiting["state"], waiting["stage"], waiting["lane"], waiting["attempts"]) == (
            "queued",
            "prefill",
            "default",
            0,
        )
        assert waiting["timeline"]["admitted"] > 1_600_000_000_000_000
        assert waiting["timeline"]["first_token"] is waiting["timeline"]["ended"] is None
        assert [choice["message"]["content"] for choice in waiting["choices"]] == ["", ""]
        await asyncio.gather(served.system.worker("prefill"), served.system.worker("decode"))
        await served.system.until(lambda: served.system.logged(request_id, 20))
        running = await shown(http, request_id)
        await served.system.until(lambda: has_state(http, request_id, "done"))
        ended = await shown(http, request_id)
        assert (running["state"], running["stage"]) == ("running", "decode")
        assert running["usage"]["completion_tokens"] >= 20
        for now, then in zip(running["choices"], ended["choices"], strict=True):
            assert now["finish_reason"] is None
            assert now["message"]["content"]
            assert then["message"]["content"].startswith(now["message"]["content"])
            assert then["finish_reason"] == "length"
        assert ended["usage"]["completion_tokens"] == 100
        times = ended["timeline"]
        names = ("admitted", "claimed_prefill", "handover", "claimed_decode", "ended")
        assert [times[name] for name in names] == sorted(times[name] for name in names)
        whole = (await http.post(CHAT, json=long(50, n=2) | {"stream": False})).json()
        assert [choice["message"] for choice in whole["choices"]] == [choice["message"] for choice in ended["choices"]]
        done = await http.post(f"/v1/requests/{request_id}/cancel")
        assert (done.status_code, done.json()["state"]) == (200, "done")


@pytest.mark.parametrize(("path", "prefix"), [(CHAT, "chatcmpl-"), ("/v1/completions", "cmpl-")])
async def test_the_id_of_an_answer_is_taken_as_it_stands(
    server: RedisServer, tmp_path: Path, path: str, prefix: str
) -> None:
    async with serving(server, tmp_path) as served, served.http() as http:
        body = stream(stream=False, max_tokens=2) if path == CHAT else {"model": POOL, "prompt": "hi", "max_tokens": 2}
        answer = await http.post(path, json=body)
        request_id = answer.headers["x-baton-request-id"]
        pasted = answer.json()["id"]
        assert pasted == prefix + request_id
        assert (await shown(http, pasted)) == (await shown(http, request_id))
        cancelled = await http.post(f"/v1/requests/{pasted}/cancel")
        assert (cancelled.json()["id"], cancelled.json()["state"]) == (request_id, "done")
        read = await http.get(f"/v1/streams/{pasted}")
        assert read.headers["x-baton-request-id"] == request_id
        assert read.text.rstrip().endswith("data: [DONE]")


async def test_an_unknown_request_is_a_404_of_its_own_code(server: RedisServer, tmp_path: Path) -> None:
    ways = [("GET", "/v1/streams/{}"), ("GET", "/v1/requests/{}"), ("POST", "/v1/requests/{}/cancel")]
    async with serving(server, tmp_path, "queue.result_ttl_s=1") as served, served.http() as http:
        ended = (await http.post(CHAT, json=stream(stream=False, max_tokens=2))).headers["x-baton-request-id"]
        await served.system.until(lambda: is_unknown(http, f"/v1/requests/{ended}"), 20)
        for method, path in ways:
            for request_id in (ended, "nothing", "baton-tiny-" + "x" * 22, "nobody-" + "x" * 22, "x" * 3000):
                response = await http.request(method, path.format(request_id))
                error = response.json()["error"]
                assert (response.status_code, error["code"], error["param"]) == (404, "request_not_found", "id")
                assert len(response.content) < 1000


async def is_unknown(http: httpx.AsyncClient, path: str) -> bool:
    return (await http.get(path)).status_code == 404


async def test_other_methods_are_answered_sensibly(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path) as served, served.http() as http:
        request_id = (await http.post(CHAT, json=stream(stream=False))).headers["x-baton-request-id"]
        for path in (f"/v1/streams/{request_id}", f"/v1/requests/{request_id}"):
            head = await http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert (await http.head(path + "x")).status_code == 404
            options = await http.options(path)
            assert options.status_code == 204
            assert {"GET", "HEAD"} <= set(options.headers["allow"].replace(",", " ").split())
            assert (await http.delete(path)).status_code == 405
        assert (await http.options(CHAT)).headers["allow"] == "POST"
        for wrong, why in (("7", "2 choice"), ("0.9999", "ahead"), ("a.b", "not an id"), ("0", "")):
            n2 = (await http.post(CHAT, json=stream(stream=False, n=2))).headers["x-baton-request-id"]
            response = await http.get(f"/v1/streams/{n2}", params={"last_event_id": wrong})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "Last-Event-ID"
            assert why in response.json()["error"]["message"]


async def test_the_same_key_reads_the_first_answer_as_a_stream_or_whole(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW) as served, served.http() as http:
        other = await served.system.api()
        async with http.stream("POST", CHAT, json=stream(), headers=KEY) as response:
            request_id = response.headers["x-baton-request-id"]
            async with client_of(other) as elsewhere:
                again = asyncio.create_task(elsewhere.post(CHAT, json=stream(), headers=KEY))
                whole = asyncio.create_task(elsewhere.post(CHAT, json=stream(stream=False), headers=KEY))
                numbered = asyncio.create_task(elsewhere.post(CHAT, json=stream(), headers=KEY | RESUMABLE))
                first = events(await response.aread())
                answers = await asyncio.gather(again, whole, numbered)
                late = await elsewhere.post(CHAT, json=stream(), headers=KEY)
                conflict = await elsewhere.post(CHAT, json=stream(max_tokens=31), headers=KEY)
                other_route = await elsewhere.post(
                    TEXT, json={"model": POOL, "prompt": "hi", "max_tokens": 2}, headers=KEY
                )
        assert {answer.headers["x-baton-request-id"] for answer in (*answers, late)} == {request_id}
        assert events(answers[0].content) == events(late.content) == first
        assert [event.data for event in events(answers[2].content)] == [event.data for event in first]
        assert all(event.id for event in events(answers[2].content)[:-1])
        body, chunk = answers[1].json(), json.loads(first[0].data)
        assert [body[name] for name in ("id", "created", "model")] == [
            chunk[name] for name in ("id", "created", "model")
        ]
        deltas = [json.loads(event.data)["choices"][0]["delta"].get("content", "") for event in first[:-1]]
        assert body["choices"][0]["message"]["content"] == "".join(deltas)
        assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert request_id in conflict.json()["error"]["message"]
        assert other_route.headers["x-baton-request-id"] != request_id
        assert await served.system.counter("admitted") == 2
        bad = await http.post(CHAT, json=stream(), headers={"Idempotency-Key": "x" * 300})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_second_reader_by_key_leaves_the_first_alone_and_a_cancelled_one_runs_again(
    server: RedisServer, tmp_path: Path
) -> None:
    async with serving(server, tmp_path, SLOW) as served, served.http() as http:
        reading = asyncio.create_task(begin(http, long(5000), KEY, 100_000))
        await served.system.until(lambda: served.running(1))
        request_id, _ = await begin(http, long(5000), KEY, 3)
        await served.system.until(lambda: served.system.logged(request_id, 40))
        assert await has_state(http, request_id, "running")
        reading.cancel()  # the one that created it
        await asyncio.gather(reading, return_exceptions=True)
        await served.system.until(lambda: has_state(http, request_id, "cancelled"))
        again, _ = await begin(http, long(5000), KEY, 3)
        assert again != request_id
        await served.system.until(served.rests, 10)


async def test_a_request_that_may_linger_waits_for_a_reader(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, SLOW) as served, served.http() as http:
        request_id, _ = await begin(http, long(200), {"X-Baton-Linger": "60"}, 3)
        keys, command = served.system.keys, served.system.connection.command
        await served.system.until(lambda: has_members(served, keys.orphans(), 1))
        due = float(await command("ZSCORE", keys.orphans(), request_id))
        seconds, micros = await command("TIME")
        assert 0 < due - (int(seconds) * 1000 + int(micros) / 1000) <= 60_000
        reading = asyncio.create_task(resume(served.url, request_id))
        await served.system.until(lambda: has_members(served, keys.orphans(), 0))
        assert (await reading)[-1].data == b"[DONE]"
        assert await has_state(http, request_id, "done")


async def has_members(served: Served, key: str, count: int) -> bool:
    return bool(await served.system.connection.command("ZCARD", key) == count)


@pytest.mark.parametrize("lane", ["high", "default", "low"])
async def test_priority_and_service_tier_choose_the_lane(server: RedisServer, tmp_path: Path, lane: str) -> None:
    asked: dict[str, list[dict[str, Any]]] = {
        "high": [{"priority": -1}, {"service_tier": "priority"}, {"priority": -2, "service_tier": "flex"}],
        "default": [{}, {"service_tier": "auto"}, {"priority": 0, "service_tier": "priority"}],
        "low": [{"priority": 3}, {"service_tier": "flex"}, {"service_tier": "batch"}],
    }
    tiers = {"high": "priority", "default": "default", "low": "flex"}
    async with serving(server, tmp_path, "api.headers_after_s=0.05", stages="") as served, served.http() as http:
        for count, fields in enumerate(asked[lane], start=1):
            request_id, data = await begin(http, stream(**fields), RESUMABLE)
            assert await served.system.counter(f"waiting:prefill:{lane}") == count
            assert (await shown(http, request_id))["lane"] == lane
            chunk = json.loads(events(data)[0].data)
            assert chunk.get("service_tier") == (tiers[lane] if "service_tier" in fields else None)


async def test_the_service_tier_is_in_whole_and_resumed_answers(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path) as served, served.http() as http:
        whole = (await http.post(CHAT, json=stream(stream=False, service_tier="flex"))).json()
        assert whole["service_tier"] == "flex"
        request_id, data = await begin(http, stream(service_tier="priority"), RESUMABLE, 5)
        tail = await resume(served.url, request_id, last_id(events(data)))
        assert {json.loads(event.data)["service_tier"] for event in tail[:-1]} <= {"priority"}
        assert "service_tier" not in (await http.post(CHAT, json=stream(stream=False))).json()


@pytest.mark.parametrize(
    ("stages", "overrides", "where"),
    [
        ("", (), "while it waited for prefill"),
        ("decode", (), "in decode"),
        ("prefill", (), "while it waited for decode"),
        ("prefill", ("engine.mock.prefill_base_ms=3000",), "in prefill"),
        ("prefill decode", ("engine.mock.decode_base_ms=200",), "in decode"),
    ],
)
async def test_a_timeout_of_the_request_is_a_504_that_names_the_stage(
    server: RedisServer, tmp_path: Path, stages: str, overrides: tuple[str, ...], where: str
) -> None:
    async with serving(server, tmp_path, "engine.mock.decode_base_ms=200", *overrides, stages=stages) as served:
        async with served.http() as http:
            body = long(500, stream=False)
            response = await http.post(CHAT, json=body, headers={"X-Request-Timeout": "1.5"})
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (504, "queue_timeout")
            assert error["message"].endswith(where), error
            record = await shown(http, response.headers["x-baton-request-id"])
            assert (record["state"], record["stage"]) == ("expired", where.split()[-1])


async def test_a_timeout_is_at_most_the_setting(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "queue.deadline_s=1", stages="") as served, served.http() as http:
        response = await http.post(CHAT, json=stream(stream=False), headers={"X-Request-Timeout": "1000"})
        assert response.status_code == 504
        for bad in ("0", "-1", "soon"):
            refused = await http.post(CHAT, json=stream(), headers={"X-Request-Timeout": bad})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Request-Timeout")


async def test_a_client_that_lost_its_connection_sends_again_under_its_key(server: RedisServer, tmp_path: Path) -> None:
    async with serving(server, tmp_path, "engine.mock.decode_base_ms=15") as served, served.http() as http:
        headers, body = {"Idempotency-Key": "once"}, stream(max_tokens=60)
        async with http.stream("POST", CHAT, json=body, headers=headers) as response:
            await anext(response.aiter_bytes())
        again = await http.post(CHAT, json=body, headers=headers)
        assert again.headers["x-baton-request-id"] == response.headers["x-baton-request-id"]
        assert again.content.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in again.content
        assert await served.system.counter("admitted") == 1
        await served.system.until(served.rests, 20)
