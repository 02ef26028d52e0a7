"""Tells the pool what the prefix cache of this worker's engine holds. Nothing waits for it, and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from pipeline.connection import Connection
from pipeline.errors import RedisUnavailable
from pipeline.keys import PoolKeys
from pipeline.kv_events import FIELD, MOST_ENTRIES, KVEvent, KVEvents, encode
from workers.engine import AsyncEngine

log = structlog.get_logger("baton.kv_events")

MOST_WAITING = 10_000  # events; older ones are left out while Redis is away, and their numbers are missing then
MOST_IN_ENTRY = 500


class KVEventWriter:
    """Numbers the events of one worker and adds them to the pool's stream."""

    def __init__(self, connection: Connection, pool: str, worker: str) -> None:
        self._connection = connection
        self._key = PoolKeys(pool).kv_events()
        self._worker = worker
        self._waiting: deque[KVEvent] = deque(maxlen=MOST_WAITING)
        self._told = 0  # events so far, those that wait included
        self._work = asyncio.Event()

    def put(self, events: list[KVEvent]) -> None:
        """Take what happened. Never waits."""
        self._waiting.extend(events)
        self._told += len(events)
        self._work.set()

    async def run(self, engine: AsyncEngine) -> None:
        """Write what the engine tells until cancelled."""
        writing = asyncio.create_task(self._write(), name="kv events")
        try:
            async for events in engine.kv_events():
                self.put(events)
            await writing
        finally:
            writing.cancel()

    async def _write(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                await self._write_one()

    async def _write_one(self) -> None:
        number = self._told - len(self._waiting)
        events = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_IN_ENTRY))]
        entry = encode(KVEvents(self._worker, number, events))
        try:
            await self._connection.command("XADD", self._key, "MAXLEN", "~", MOST_ENTRIES, "*", FIELD, entry)
        except RedisUnavailable as error:  # a reader sees by the numbers that something is missing
            log.warning(
                "what the prefix cache holds was not told", worker=self._worker, events=len(events), error=str(error)
            )
