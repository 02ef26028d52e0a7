"""Waiting for the ends of many requests at once: one future each, no stream, no tokens.

An end is heard on the bus at once, where its request was admitted with `Admission.notify`. Those of other processes' requests, and
those that the bus has lost, are found by looking at all that is waited for, in one call for some hundreds of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from pipeline.errors import BatonError
from pipeline.queue import Brief

LOOK_AT = 256  # requests of one call


class Ends:
    """Who waits for which request. `read` tells how requests stand (`PoolQueue.standing`)."""

    def __init__(self, read: Callable[[Sequence[str]], Awaitable[list[Brief | None]]]) -> None:
        self._read = read
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, request_id: str) -> None:
        """Return when the request has ended, or is unknown. Raises `RedisUnavailable` when Redis was away for too long."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request_id, set()).add(waiter)
        try:
            (brief,) = await self._read([request_id])  # it may be over already; from now on its end is heard
            if brief is not None and not brief.has_ended:
                await waiter
        finally:
            waiters = self._waiting.get(request_id, set())
            waiters.discard(waiter)
            if not waiters:
                self._waiting.pop(request_id, None)

    def feed(self, request_id: str) -> None:
        """The bus says that it has ended."""
        for waiter in self._waiting.get(request_id, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def look(self) -> None:
        """Find the ends that were not heard. Raises `RedisUnavailable`."""
        ids = list(self._waiting)
        for start in range(0, len(ids), LOOK_AT):
            some = ids[start : start + LOOK_AT]
            for request_id, brief in zip(some, await self._read(some), strict=True):
                if brief is None or brief.has_ended:
                    self.feed(request_id)

    def fail(self, error: BatonError) -> None:
        """Nobody can tell any more: everyone who waits gets the error."""
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
                    waiter.exception()  # one that has left meanwhile does not hear it
