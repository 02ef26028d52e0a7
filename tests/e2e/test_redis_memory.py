"""Redis at its memory limit: what runs goes on to its end, what is new is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.errors import QueueFull
from tests.system import System, collect, request

pytestmark = pytest.mark.faults


async def test_running_requests_end_and_new_ones_are_refused(redis_url: str, tmp_path: Path) -> None:
    async with System(redis_url, "engine.mock.decode_base_ms=15", log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        async with system.client() as client:
            streams = [await client.submit(request(30, n=2, max_tokens=50)) for _ in range(3)]
            reading = [asyncio.create_task(collect(stream, 2)) for stream in streams]
            await system.connection.command("CONFIG", "SET", "maxmemory", "1mb")
            try:
                with pytest.raises(QueueFull) as refusal:
                    await client.submit(request(30))
                assert refusal.value.retry_after_s > 0
                for tokens, ended in await asyncio.gather(*reading):
                    assert ended.state == "done"
                    assert [len(choice) for choice in tokens] == [50, 50]
            finally:
                await system.connection.command("CONFIG", "SET", "maxmemory", "0")
            tokens, ended = await collect(await client.submit(request(30)))
            assert ended.state == "done"
