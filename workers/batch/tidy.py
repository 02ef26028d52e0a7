"""What a batch leaves on its way: requests whose answers are in parts, parts whose lines are in its files. Whoever finds it removes it."""

from __future__ import annotations

import asyncio

from pipeline.batches.record import IDS
from pipeline.batches.records import BatchRecords
from pipeline.connection import Connection
from pipeline.files.scratch import Scratch
from pipeline.ids import pool_of
from pipeline.queue import PoolQueue

AT_ONCE = 64  # requests that are erased together


class Leftovers:
    """Removes them. Every method raises RedisUnavailable, all but `erase_spent` StorageUnavailable, too."""

    def __init__(self, connection: Connection, records: BatchRecords, scratch: Scratch) -> None:
        self._connection = connection
        self._records = records
        self._scratch = scratch
        self._queues: dict[str, PoolQueue] = {}

    async def erase_spent(self, batch_id: str) -> None:
        """Forget the requests of a batch that nobody needs."""
        spent = await self._records.spent(batch_id)
        for start in range(0, len(spent), AT_ONCE):
            some = spent[start : start + AT_ONCE]
            await asyncio.gather(*(self._queue(one).erase(one) for one in some))
            await self._records.forget_spent(batch_id, some)

    async def remove(self, batch_id: str) -> None:
        """Everything that is left of a batch that has ended."""
        await self.erase_spent(batch_id)
        for name in await self._scratch.names():
            if name.startswith(f"{batch_id}."):
                await self._scratch.remove(name)
        await self._records.tidied(batch_id)

    async def remove_all(self, *, is_thorough: bool) -> None:
        """The same of all whose worker died at the very end. `is_thorough`: parts that no batch knows of, too."""
        ids = set(await self._records.untidy())
        if is_thorough:
            names = {name.partition(".")[0] for name in await self._scratch.names()}
            ids |= {name for name in names if IDS.has(name)}
        for batch_id in await self._records.ended(sorted(ids)):
            await self.remove(batch_id)

    def _queue(self, request_id: str) -> PoolQueue:
        pool = pool_of(request_id)
        if pool not in self._queues:
            self._queues[pool] = PoolQueue(self._connection, pool)
        return self._queues[pool]
