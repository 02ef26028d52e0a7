"""A running Baton with its HTTP side, for tests that speak to it as clients do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai

from pipeline.redis_server import RedisServer
from tests.system import POOL, System

STREAM = {"model": POOL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}


@dataclasses.dataclass
class Served:
    """A system with at least one API process; `url` is its base."""

    system: System
    url: str
    log_dir: Path

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            yield http

    def openai(self, **options: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)  # type: ignore[arg-type]

    def api_log(self) -> str:
        return "".join(path.read_text() for path in self.log_dir.glob("api*.log"))

    async def rests(self) -> bool:
        return not await self.system.at_rest()

    @property
    def api(self) -> subprocess.Popen[bytes]:
        """The API's process."""
        return next(process for process in self.system.processes if "api" in process.args)  # type: ignore[operator]

    async def running(self, count: int) -> bool:
        """Whether as many requests have tokens in their logs."""
        return len(await self.system.connection.command("KEYS", self.system.keys.root + "log:*")) == count

    async def ended(self, state: str) -> int:
        return await self.system.counter(f"ended:{state}")


@contextlib.asynccontextmanager
async def serving(
    server: RedisServer, log_dir: Path, *overrides: str, stages: str = "prefill decode"
) -> AsyncIterator[Served]:
    """Workers of these stages and an API over an emptied database."""
    server.command("FLUSHALL")
    async with System(server.url, *overrides, log_dir=log_dir) as system:
        starts = [system.worker(stage) for stage in stages.split()]
        url, *_ = await asyncio.gather(system.api(), *starts)
        yield Served(system, url, log_dir)


async def events_of(response: httpx.Response) -> bytes:
    """All bytes of a stream."""
    return b"".join([part async for part in response.aiter_raw()])
