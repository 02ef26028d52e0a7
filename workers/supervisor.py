"""Keeps a worker's engine running: starts it, passes its outputs on, replaces it when it dies or stalls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from pipeline.config import WorkerSettings
from pipeline.errors import BatonError, EngineDied
from pipeline.protocol import LLMEngineOutput
from workers.child import ChildEngine
from workers.engine import EngineStats
from workers.holdings import Holdings
from workers.policy import free_for_share

log = structlog.get_logger("baton.engine")


class EngineSupervisor:
    """Owns the child. `start` once, then `run` until cancelled, then `close`."""

    def __init__(
        self, engine: ChildEngine, holdings: Holdings, settings: WorkerSettings, *,
        on_outputs: Callable[[list[LLMEngineOutput]], Awaitable[None]], on_change: Callable[[], None],
    ) -> None:  # fmt: skip
        self._has_started = False
        self._engine = engine
        self._holdings = holdings
        self._settings = settings
        self._on_outputs = on_outputs
        self._on_change = on_change

    @property
    def is_up(self) -> bool:
        """Whether tasks may be claimed for the engine."""
        return self._has_started and self._engine.is_reachable

    async def start(self) -> None:
        """First start; what the engine cannot serve is raised here, before any task is claimed."""
        await self._engine.start()
        self._has_started = True
        log.info("engine is up", pid=self._engine.pid, **msgspec.to_builtins(self._engine.info))

    async def run(self) -> None:
        """Pass outputs on; after a death every held delivery fails with `EngineDied` and the engine is started again."""
        delay_s = 0.2
        while True:
            stalls = asyncio.create_task(self._watch_for_stall(), name="engine stall watch")
            try:
                async for outputs in self._engine.steps():
                    await self._on_outputs(outputs)
                    delay_s = 0.2
            except EngineDied as error:
                self._has_started = False
                log.error("engine died", error=str(error), held=len(self._holdings))
                for held in self._holdings.all():
                    held.fail(error)
            finally:
                stalls.cancel()
            await self._engine.close()
            await self._restart(delay_s)
            delay_s = min(delay_s * 2, 30.0)

    async def _restart(self, delay_s: float) -> None:
        while True:
            await asyncio.sleep(delay_s)
            try:
                await self._engine.start()
            except BatonError as error:
                log.error("engine does not start, trying again", error=str(error), next_try_s=delay_s)
                await self._engine.close()
                delay_s = min(delay_s * 2, 30.0)
                continue
            self._has_started = True
            self._on_change()
            log.info("engine is up again", pid=self._engine.pid)
            return

    async def _watch_for_stall(self) -> None:
        """Kill a child that has work but whose step counter stands still: its tasks go to somebody who moves."""
        steps, moved_s = -1, time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._settings.stall_s / 4))
            now_s = time.monotonic()
            if not self._has_work() or self._engine.stats().steps != steps:
                steps, moved_s = self._engine.stats().steps, now_s
            elif now_s - moved_s > self._settings.stall_s:
                log.error("engine stalled, stopping it", pid=self._engine.pid, seconds=round(now_s - moved_s, 1))
                await self._engine.kill()
                return

    def _has_work(self) -> bool:
        """What is held may only wait for Redis to take it; a child that says nothing has not told what else it has."""
        is_silent = time.monotonic() - self._engine.heard_s > self._settings.stall_s / 4
        return len(self._holdings) > 0 and (is_silent or self._engine.is_busy())

    async def close(self) -> None:
        """Stop the engine in good order."""
        self._has_started = False
        await self._engine.close()


STEPS_AHEAD = (
    2  # steps of prompt tokens that a prefill worker holds: one that runs, and what comes next without a pause
)
BY_TOKENS = ("prefill", "embed")  # stages whose workers hold as much as some steps of prompt tokens


class EngineCapacity:
    """What a worker may claim: bounded by blocks and sequences, for embeddings by tokens in work, for prefill also by room for handles."""

    def __init__(
        self, engine: ChildEngine, holdings: Holdings, supervisor: Callable[[], bool], *, stage: str,
        is_paused: Callable[[], bool] = lambda: False, is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._holdings = holdings
        self._is_up = supervisor
        self._stage = stage
        self._is_paused = is_paused
        self._is_leaving = is_leaving

    def free_blocks(self, share: float = 1.0) -> int:
        """See `Capacity.free_blocks`. A worker never claims what it would only keep waiting while others are idle."""
        if not self._is_up() or self._is_paused():
            return 0
        info = self._engine.info
        in_use = self._holdings.blocks(info.block_size)
        is_full = self._holdings.prompt_tokens() >= STEPS_AHEAD * max(1, info.max_num_batched_tokens)
        if self._stage in BY_TOKENS and is_full:
            return 0
        if self._stage == "prefill":
            stats = self._engine.stats()
            exported, room = stats.handle_bytes // info.block_nbytes, self._room(stats)
            for_lane = free_for_share(share, room, exported + in_use)
            return min(info.num_blocks - in_use, room - exported - in_use, for_lane)
        if self._stage == "decode" and self._holdings.choices() >= info.max_num_seqs:
            return 0
        return info.num_blocks - in_use

    def step_fill(self) -> float:
        """See `Capacity.step_fill`: of prefill and embeddings. What decode claims joins the running batch."""
        if self._stage not in BY_TOKENS:
            return 0.0
        return self._holdings.prompt_tokens() / max(1, self._engine.info.max_num_batched_tokens)

    def total_blocks(self) -> int:
        """See `Capacity.total_blocks`."""
        info = self._engine.info
        if self._stage != "prefill":
            return info.num_blocks
        return min(info.num_blocks, self._room(self._engine.stats()))

    def block_size(self) -> int:
        """See `Capacity.block_size`."""
        return self._engine.info.block_size

    def _room(self, stats: EngineStats) -> int:
        """Blocks that fit the room for handles when it is empty."""
        return (stats.handle_bytes + stats.handle_bytes_free) // self._engine.info.block_nbytes

    def describe(self) -> bytes:
        """Engine facts and figures, for status and metrics."""
        info, stats = self._engine.info, self._engine.stats()
        return msgspec.json.encode(
            {
                "stage": self._stage,
                "up": self._is_up(),
                "paused": self._is_paused(),
                "leaving": self._is_leaving(),
                "total_blocks": self.total_blocks() or None,
                "engine": info,
                "stats": stats,
            }
        )
