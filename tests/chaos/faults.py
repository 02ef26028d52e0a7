"""Faults that come at any moment: one after the other, each kind once before any comes again, in seeded order."""

from __future__ import annotations

import asyncio
import collections
import random
import signal
from collections.abc import Awaitable, Callable

from pipeline.errors import RedisUnavailable
from tests.chaos.fleet import LEASE_S, Fleet
from tests.chaos.journal import Journal

PAUSE_MS = 500


class Weather:
    """`run` it as a task until cancelled. `counts` says what came how often."""

    def __init__(self, fleet: Fleet, journal: Journal, rng: random.Random, *, power_cuts: bool) -> None:
        self._fleet, self._journal, self._rng = fleet, journal, rng
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "worker killed": self._kill_worker,
            "API killed": self._kill_api,
            "engine killed": self._kill_engine,
            "worker frozen past its lease": lambda: self._freeze("parent", "prefill", "decode"),
            "engine frozen": lambda: self._freeze("child", "prefill", "decode"),
            "worker and engine frozen past its lease": lambda: self._freeze("both", "prefill", "decode"),
            "API frozen": lambda: self._freeze("parent", "api", seconds=LEASE_S / 2),
            "API frozen past its lease": lambda: self._freeze("parent", "api"),
            "worker drained": self._drain,
            "Redis killed and restarted": lambda: self._restart_redis(signal.SIGKILL),
            "Redis stopped and restarted": lambda: self._restart_redis(signal.SIGTERM),
            "connections killed": lambda: self._tell_redis("CLIENT", "KILL", "TYPE", "normal"),
            "subscriptions killed": lambda: self._tell_redis("CLIENT", "KILL", "TYPE", "pubsub"),
            "Redis paused": lambda: self._tell_redis("CLIENT", "PAUSE", str(PAUSE_MS)),
            "scripts flushed": lambda: self._tell_redis("SCRIPT", "FLUSH"),
        }
        if power_cuts:
            self._kinds["Redis lost its last second"] = self._cut_power
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(self._kinds, 0))

    async def run(self, pause_s: float) -> None:
        """One fault after another."""
        while True:
            kinds = list(self._kinds)
            self._rng.shuffle(kinds)
            for kind in kinds:
                await asyncio.sleep(self._rng.uniform(0.5, 1.5) * pause_s)
                await self._kinds[kind]()
                self.counts[kind] += 1

    async def _kill_worker(self) -> None:
        member = await self._fleet.whole("prefill", "decode")
        await self._journal.touch(member)
        self._fleet.kill(member)

    async def _kill_api(self) -> None:
        self._fleet.kill(await self._fleet.whole("api"))

    async def _kill_engine(self) -> None:
        member = await self._fleet.whole("prefill", "decode")
        await self._journal.touch(member)
        self._fleet.kill_engine(member)

    async def _freeze(self, what: str, *roles: str, seconds: float = 1.6 * LEASE_S) -> None:
        member = await self._fleet.whole(*roles)
        await self._journal.touch(member)
        await self._fleet.freeze(member, what, seconds)

    async def _drain(self) -> None:
        member = await self._fleet.whole("prefill", "decode")
        await self._journal.touch(member)
        self._fleet.drain(member)

    async def _restart_redis(self, number: signal.Signals) -> None:
        self._journal.touch_all()
        await self._fleet.redis.restart(number)

    async def _cut_power(self) -> None:
        self._journal.touch_all()
        await self._fleet.redis.cut_power()

    async def _tell_redis(self, *words: str) -> None:
        self._journal.touch_all()
        try:
            await self._fleet.redis.command(*words)
        except RedisUnavailable:
            if words[:2] != ("CLIENT", "KILL"):  # which may kill the connection that asks for it
                raise
