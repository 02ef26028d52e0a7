"""One request that kills its engine is the only one that is given up; those beside it get the tokens that they would have had."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.protocol import Request
from pipeline.snapshot import set_router
from pipeline.stream import Ended
from tests.system import System, collect, request

pytestmark = pytest.mark.faults

KILLS = 2000  # a prompt with this token id kills the engine
PROMPT = list(range(3, 40))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_one_that_kills_its_engine_among_15_innocent_ones(
    default_redis_url: str, tmp_path: Path, stage: str
) -> None:
    settings = (
        f"engine.mock.kill_token={KILLS}",
        "engine.mock.prefill_base_ms=50",
        "worker.sweep_s=0.05",
        "worker.stall_s=20",
    )
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system, system.client() as client:
        if stage == "decode":  # which then computes the prompts itself
            await set_router(system.connection, system.keys, {"max_local_prefill_length": 1000})
            await system.until(lambda: knows_settings(client), 10)
        items = [request([7 + i, *PROMPT], max_tokens=40) for i in range(16)]
        killer = request([*PROMPT, KILLS], max_tokens=40)
        items[8] = killer
        reading = [asyncio.create_task(read(client, item)) for item in items]
        await system.until(lambda: system.counter("admitted"), 10)
        workers = [await system.worker("prefill"), await system.worker("decode")]
        answers = await asyncio.gather(*reading)
        for item, (tokens, ended) in zip(items, answers, strict=True):
            if item is killer:
                assert (ended.state, tokens) == ("dead", [[]]), ended
            else:
                assert ended.state == "done", ended
                undisturbed, _ = await read(client, request(item.input.token_ids, max_tokens=40))
                assert tokens == undisturbed
        assert await system.counter("ended:dead") == 1
        assert [worker.poll() for worker in workers] == [None, None]
        await system.until(system.rests, 20)


async def read(client: PoolClient, item: Request) -> tuple[list[list[int]], Ended]:
    return await collect(await client.submit(item))


async def knows_settings(client: PoolClient) -> bool:
    return bool((await client.snapshot()).settings)
