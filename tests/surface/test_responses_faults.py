"""Responses of the background outlive the API process that took them: another one tells the rest, and the whole of it. What becomes of
them without workers, and when their time is over."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from pipeline.redis_server import RedisServer
from tests.openai_types import events_in, strictly
from tests.serving import Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.faults

SETTINGS = ("worker.lease_s=1.5", "engine.mock.decode_base_ms=10")
ASKED: dict[str, Any] = {
    "model": POOL, "input": "Hello", "max_output_tokens": 300, "seed": 1, "ignore_eos": True, "background": True
}  # fmt: skip


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def kill_first_api(served: Served) -> None:
    process: subprocess.Popen[bytes] = served.api
    process.kill()
    process.wait()


async def retrieved(served: Served, url: str, response_id: str, after: int | None = None) -> bytes:
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    async with served.http() as http, http.stream("GET", f"{url}/v1/responses/{response_id}", params=query) as answer:
        assert answer.status_code == 200
        return await events_of(answer)


async def test_a_stream_goes_on_at_another_api_when_the_first_is_killed(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, *SETTINGS) as served:
        other = await served.system.api()
        seen: list[dict[str, Any]] = []
        async with served.http() as http:
            async with http.stream("POST", "/v1/responses", json={**ASKED, "stream": True}) as answer:
                data = b""
                async for part in answer.aiter_raw():
                    data += part
                    if data.count(b"output_text.delta\n") >= 20:
                        break
                await kill_first_api(served)
            seen = events_in(data[: data.rindex(b"\n\n") + 2])
        response_id = seen[0]["response"]["id"]
        rest = events_in(await retrieved(served, other, response_id, seen[-1]["sequence_number"]))
        whole = events_in(await retrieved(served, other, response_id))
        assert seen + rest == whole
        assert whole[-1]["type"] == "response.incomplete"
        async with client_of(other) as client:
            last = await client.responses.retrieve(response_id)
        assert last.usage is not None
        assert (last.status, last.usage.output_tokens) == ("incomplete", 300)
        await served.system.until(served.rests, 20)


async def test_what_nobody_reads_goes_on_when_its_api_is_killed(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with serving(default_redis_server, tmp_path, *SETTINGS) as served:
        other = await served.system.api()
        async with served.http() as http:
            queued = (await http.post("/v1/responses", json=ASKED)).json()
        assert strictly(Response, queued).status == "queued"
        await kill_first_api(served)
        last = events_in(await retrieved(served, other, queued["id"]))[-1]
        assert (last["type"], last["response"]["usage"]["output_tokens"]) == ("response.incomplete", 300)
        assert await served.system.counter("ended:cancelled") == 0


async def test_what_no_worker_takes_fails_at_its_deadline(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with serving(default_redis_server, tmp_path, *SETTINGS, stages="") as served, served.http() as http:
        limited = {"X-Request-Timeout": "0.5"}
        queued = (await http.post("/v1/responses", json=ASKED, headers=limited)).json()
        data = await retrieved(served, served.url, queued["id"])
        kinds = [event["type"] for event in events_in(data)]
        assert kinds == ["response.created", "response.queued", "response.failed"]
        found = (await http.get(f"/v1/responses/{queued['id']}")).json()
        failed = strictly(Response, found)
        assert failed.status == "failed"
        assert failed.error is not None
        assert "time ran out" in failed.error.message
        assert found == events_in(data)[-1]["response"]
        waited = await http.post("/v1/responses", json={**ASKED, "background": False}, headers=limited)
        assert (waited.status_code, waited.json()["error"]["code"]) == (504, "queue_timeout")


async def test_a_response_lives_as_long_as_the_settings_say(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        serving(default_redis_server, tmp_path, *SETTINGS, "queue.result_ttl_s=1") as served,
        served.http() as http,
    ):
        made = (await http.post("/v1/responses", json={**ASKED, "background": False, "max_output_tokens": 2})).json()

        async def is_gone() -> bool:
            return (await http.get(f"/v1/responses/{made['id']}")).status_code == 404

        await served.system.until(is_gone, 20)
        answer = await http.post("/v1/responses", json={**ASKED, "previous_response_id": made["id"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "previous_response_not_found")
