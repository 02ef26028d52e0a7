"""Log probabilities of prompts when something is in the way: an engine that has none, a worker that dies with them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.surface.test_prompt_logprobs import TEXT, TOLERANCE, TORCH, post
from tests.system import POOL


async def test_an_engine_without_them_refuses_by_name(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with serving(default_redis_server, tmp_path, stages="decode") as mock, mock.http() as http:
        for body in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
            answer = await http.post("/v1/completions", json={"model": POOL, "prompt": "a", **body})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "unsupported_parameter"
            assert answer.json()["error"]["param"] in body


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_they_outlive_who_computed_them(default_redis_server: RedisServer, tmp_path: Path, victim: str) -> None:
    """A prefill worker dies before it hands over, or a decode worker in the middle of an answer."""
    settings = (TORCH, "worker.lease_s=2", "engine.torch.max_num_batched_tokens=9", "engine.torch.max_num_seqs=8")
    long_enough = 20 if victim == "prefill" else 2  # for the death to come in the middle of it
    body = {"prompt": TEXT * long_enough, "max_tokens": 150, "logprobs": 1, "echo": True, "ignore_eos": True}
    other = "decode" if victim == "prefill" else "prefill"
    async with serving(default_redis_server, tmp_path, *settings, stages=other) as it, it.http() as http:
        system, doomed = it.system, await it.system.worker(victim)
        expected = (await post(http, **body))["choices"][0]
        begun = await system.counter("admitted")
        answer = asyncio.create_task(post(http, **body))
        await system.until(lambda: computes(it, victim), 60)
        doomed.send_signal(signal.SIGKILL)
        assert await system.counter("admitted") == begun + 1
        await system.worker(victim)
        found = (await answer)["choices"][0]
        assert found["text"] == expected["text"]
        for name in ("tokens", "text_offset"):
            assert found["logprobs"][name] == expected["logprobs"][name]
        told, before = (one["logprobs"]["token_logprobs"] for one in (found, expected))
        assert told[0] is before[0] is None
        assert told[1:] == pytest.approx(before[1:], abs=TOLERANCE)
        await system.until(it.rests, 10)


async def computes(it: Served, stage: str) -> bool:
    """Whether a request is in the hands of a worker of this stage, and in the middle of it."""
    command, keys = it.system.connection.command, it.system.keys
    for key in await command("KEYS", keys.root + "req:*"):
        request_id = key.decode().removeprefix(keys.root + "req:")
        if list(await command("HMGET", key, "state", "stage")) == [b"running", stage.encode()]:
            return stage == "prefill" or await it.system.logged(request_id, 5)
    return False


async def test_a_decode_worker_that_prefills_by_itself_tells_the_same(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = (TORCH, "router.max_local_prefill_length=1000")
    body = {"prompt": [TEXT, TEXT * 9], "max_tokens": 3, "logprobs": 1, "echo": True, "ignore_eos": True, "seed": 1}
    told = []
    for more in (settings, (TORCH,)):
        async with serving(default_redis_server, tmp_path, *more) as it, it.http() as http:
            answer = await post(http, **body)
            assert await it.system.counter("handovers") == (0 if more is settings else 2)
            told.append([choice["logprobs"] for choice in answer["choices"]])
            await it.system.until(it.rests, 10)
    for local, handed in zip(*told, strict=True):
        assert local["tokens"] == handed["tokens"]
        assert local["token_logprobs"][1:] == pytest.approx(handed["token_logprobs"][1:], abs=TOLERANCE)
