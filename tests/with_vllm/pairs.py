"""vLLM's engines in processes of their own, small enough for a laptop: one, or a pair that hands over."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pipeline.builtin import BUILTIN_MODEL
from pipeline.config import EngineSettings, PoolSettings, TransferSettings, VllmSettings
from pipeline.errors import EngineDied
from tests.contract.engines import Running
from workers.child import STATS_S, ChildEngine
from workers.engine import EngineStats

BLOCK = 32
ARENA_BLOCKS = 25
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "block_size": BLOCK,
    "kv_cache_bytes": 2**26,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "enforce_eager": True,
}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that look random; different seeds share no first block."""
    return [16 + (seed * 7919 + position * (2 * seed + 31) + position * position) % 2000 for position in range(length)]


@dataclasses.dataclass
class Pair:
    """A prefill and a decode engine."""

    prefill: Running
    decode: Running

    async def rests(self) -> None:
        """Both have given back every block and every handle."""
        async with asyncio.timeout(20):
            for running in (self.prefill, self.decode):
                while held(await fresh(running)) != (0, 0, 0, 0):
                    pass


async def fresh(running: Running) -> EngineStats:
    """Figures that the engine has said since this was called; what it said while nobody read lies before them."""
    await asyncio.sleep(2 * STATS_S)
    before = running.engine.stats()
    while running.engine.stats() is before:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return running.engine.stats()


def held(stats: EngineStats) -> tuple[int, int, int, int]:
    """What is not given back yet."""
    return stats.blocks_used, stats.handles_exported, stats.running, stats.waiting


@contextlib.asynccontextmanager
async def child(
    name: str, place: Path, model: str = BUILTIN_MODEL, loras: str = "", **fields: Any
) -> AsyncIterator[Running]:
    """An engine in a process of its own; `fields` are of `[engine.vllm]`."""
    settings = VllmSettings(**{**SMALL, **fields})
    transfer = TransferSettings(dir=str(place), arena_bytes=ARENA_BLOCKS * 163840 + 65536, verify=True)
    pool = PoolSettings(model=model, engine="vllm", max_model_len=2048, loras=loras)
    engine = ChildEngine(name, pool, EngineSettings(vllm=settings), transfer, exports=True)
    try:
        await engine.start()
    except BaseException:
        await engine.close()
        raise
    running = Running(engine)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        await engine.close()
        with contextlib.suppress(EngineDied):
            await running.reading


@contextlib.asynccontextmanager
async def pair_at(place: Path, **fields: Any) -> AsyncIterator[Pair]:
    """Both engines; at the end they have given back everything."""
    async with child("prefill", place, **fields) as prefill, child("decode", place, **fields) as decode:
        pair = Pair(prefill, decode)
        yield pair
        await pair.rests()
    assert not list(place.iterdir()), "shared memory was left behind"
