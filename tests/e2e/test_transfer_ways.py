"""Blocks between real workers by each way: the tokens of the aggregated run, nothing computed again, and figures that tell the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.client import PoolClient
from pipeline.control import ControlClient
from pipeline.snapshot import take_snapshot
from tests.contract.transfer_blocks import requires_nixl
from tests.system import POOL, System, collect, request

TORCH = (f"pools.{POOL}.engine=torch", "engine.torch.num_blocks=512", "engine.torch.prefix_cache=false")
LENGTHS = [1, 15, 16, 17, 40, 100, 333]


async def answers(client: PoolClient) -> list[list[list[int]]]:
    """Greedy tokens of prompts of several lengths, some with several choices."""
    items = [request(length, n=1 + number % 2, max_tokens=12) for number, length in enumerate(LENGTHS)]
    streams = [await client.submit(item) for item in items]
    ended = await asyncio.gather(
        *(collect(stream, item.input.sampling_options.n) for stream, item in zip(streams, items, strict=True))
    )
    assert {end.state for _, end in ended} == {"done"}
    return [tokens for tokens, _ in ended]


async def transfer_told(system: System, stage: str) -> dict[str, Any]:
    """What the worker of a stage says of its transfer in `baton inspect stats`."""
    (name,) = await system.alive(stage)
    replies = await ControlClient(system.connection, POOL).ask("stats", to=[name], timeout_s=20)
    return dict(replies.answers[name].value["transfer"])


async def run(
    redis_url: str, folder: Path, way: str, prefill: Sequence[str], decode: Sequence[str], *engine: str
) -> None:
    async with System(redis_url, *engine, log_dir=folder) as system, system.client() as client:
        alone = await system.worker("decode", *decode)
        aggregated = await answers(client)
        alone.terminate()
        await asyncio.to_thread(alone.wait, 20)
        await system.worker("prefill", *prefill)
        await system.worker("decode", *decode)
        assert await answers(client) == aggregated
        counters = (await take_snapshot(system.connection, system.keys)).counters
        assert counters["handovers"] == len(LENGTHS)
        assert not [name for name in counters if name.startswith("kv_recomputed:")]

        async def told() -> bool:
            fetched = (await transfer_told(system, "decode"))["fetched"]
            return list(fetched) == [way] and fetched[way]["handles"] == len(LENGTHS) and fetched[way]["nbytes"] > 0

        await system.until(told, 10)
        await system.until(system.rests, 10)


@pytest.mark.parametrize("engine", ["mock", "torch"])
async def test_over_tcp(default_redis_url: str, tmp_path: Path, engine: str) -> None:
    tcp = ["transfer.kind=tcp"]
    await run(default_redis_url, tmp_path, "tcp", tcp, tcp, *(TORCH if engine == "torch" else ()))


async def test_by_whatever_works_in_one_shared_memory(default_redis_url: str, tmp_path: Path) -> None:
    await run(default_redis_url, tmp_path, "shm", [], [])


async def test_by_whatever_works_where_shared_memory_is_not_shared(
    default_redis_url: str, tmp_path: Path, short_dir: Path
) -> None:
    """As on two hosts, or in two containers."""
    await run(default_redis_url, tmp_path, "tcp", [], [f"transfer.dir={short_dir}"])


@pytest.mark.parametrize("engine", ["mock", "torch"])
@pytest.mark.parametrize("way", [pytest.param("nixl", marks=requires_nixl)])
async def test_over_nixl(default_redis_url: str, tmp_path: Path, engine: str, way: str) -> None:
    nixl = [f"transfer.kind={way}"]
    await run(default_redis_url, tmp_path, way, nixl, nixl, *(TORCH if engine == "torch" else ()))
