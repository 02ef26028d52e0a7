"""A running Baton with a batch worker, and files of requests for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import openai

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
QUICK = ("batches.lease_s=3", "batches.part_s=1")


@dataclasses.dataclass
class Batching:
    """A system with an API and batch workers."""

    served: Served
    client: openai.AsyncOpenAI

    def worker(self, *words: str) -> subprocess.Popen[bytes]:
        """One more batch worker."""
        return self.served.system.spawn("workers", "batch", *words)

    async def upload(self, lines: Iterable[bytes | dict[str, Any]]) -> str:
        """A file of requests."""
        data = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
        file = await self.client.files.create(file=("in.jsonl", data), purpose="batch")
        return file.id

    async def batch(self, lines: Iterable[bytes | dict[str, Any]], endpoint: str = TEXTS, **more: Any) -> Any:
        """A batch that was made of lines."""
        file_id = await self.upload(lines)
        fields: dict[str, Any] = {"completion_window": "24h", **more}
        return await self.client.batches.create(input_file_id=file_id, endpoint=endpoint, **fields)  # type: ignore[arg-type]

    async def ended(self, batch_id: str, limit_s: float = 90) -> Any:
        """A batch at its end."""
        found: list[Any] = []

        async def has_ended() -> bool:
            found[:] = [await self.client.batches.retrieve(batch_id)]
            return found[0].status in ("completed", "failed", "expired", "cancelled")

        await self.served.system.until(has_ended, limit_s)
        return found[0]

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """What a file of results says."""
        if file_id is None:
            return []
        content = await self.client.files.content(file_id)
        return [json.loads(line) for line in content.content.splitlines()]


@contextlib.asynccontextmanager
async def batching(
    server: RedisServer, log_dir: Path, *overrides: str, workers: int = 1, stages: str = "prefill decode"
) -> AsyncIterator[Batching]:
    """Workers of these stages, an API and batch workers over an emptied database."""
    async with serving(server, log_dir, *QUICK, *overrides, stages=stages) as served:
        async with served.openai() as client:
            it = Batching(served, client)
            for _ in range(workers):
                it.worker()
            yield it


def text_line(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line that asks for a completion."""
    asked = {"model": POOL, "prompt": f"number {custom_id}", "max_tokens": 3} | body
    return {"custom_id": custom_id, "method": "POST", "url": TEXTS, "body": asked}


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line that asks for a chat."""
    asked = {"model": POOL, "messages": [{"role": "user", "content": f"number {custom_id}"}], "max_tokens": 3} | body
    return {"custom_id": custom_id, "method": "POST", "url": CHATS, "body": asked}
