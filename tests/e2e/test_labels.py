"""The label that a client gave its request stands in each line that an API or a worker logs about it, and in no other's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from pipeline.redis_server import RedisServer
from tests.serving import serving
from tests.system import POOL

JSON = "log.format=json"


def lines_of(folder: Path, module: str) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(folder.glob(f"{module}-*.log"))]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]


async def test_a_label_is_in_all_lines_about_its_request(default_redis_server: RedisServer, tmp_path: Path) -> None:
    settings = (JSON, "worker.drain_s=0.1", "engine.mock.decode_base_ms=20")
    async with serving(default_redis_server, tmp_path, *settings) as it, it.http() as http:

        async def ask(label: str, max_tokens: int) -> str:
            body = {"model": POOL, "prompt": [5] * 20, "max_tokens": max_tokens}
            answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": label})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-baton-request-id"]

        async def has_handed_over(count: int) -> bool:
            return await it.system.counter("handovers") == count

        short = [ask(f"short {number}", 3) for number in range(4)]
        long = asyncio.create_task(ask("long", 120))
        labels = {await one: f"short {number}" for number, one in enumerate(short)}
        await it.system.until(lambda: has_handed_over(5), 20)
        [decode] = [one for one in it.system.processes if "decode" in one.args]  # type: ignore[operator]
        decode.terminate()  # hands back what it cannot finish, and another one goes on
        await it.system.worker("decode")
        labels[await long] = "long"
        unlabelled = await http.post("/v1/completions", json={"model": POOL, "prompt": [5], "max_tokens": 2})
        labels[unlabelled.headers["x-baton-request-id"]] = unlabelled.headers["x-request-id"]
    for module in ("workers", "api"):
        about = [line for line in lines_of(tmp_path, module) if line.get("request_id") in labels]
        assert {line["request_id"] for line in about} == set(labels)
        for line in about:
            assert line.get("x_request_id") == labels[line["request_id"]], line
        others = [line for line in lines_of(tmp_path, module) if "request_id" not in line]
        assert not any("x_request_id" in line for line in others if module == "workers")
    said = [line["event"] for line in lines_of(tmp_path, "workers") if line.get("x_request_id") == "long"]
    assert said.count("task received") == 3  # prefill, and decode twice
    assert "task succeeded" in said
