"""Copies of blocks that leave the event loop free: short ones are made at once, long ones in threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

INLINE_BYTES = 1_048_576  # a copy up to this size takes less time than the hop to a thread and back

log = logging.getLogger(__name__)
T = TypeVar("T")


class CopyThreads:
    """A few threads. A caller that is cancelled still waits for its copy: memory never changes hands under a running one."""

    def __init__(self, count: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def copy(self, nbytes: int, work: Callable[[], T], *, device: int | None = None) -> T:
        """Run a copy of so many bytes, here or in a thread; returns what it returns. A GPU (`device`) is waited for in a thread."""
        is_short = nbytes <= INLINE_BYTES and device is None
        return work() if is_short else await self.run(work)

    async def run(self, work: Callable[[], T], *, stop: Callable[[], None] = lambda: None) -> T:
        """Run it in a thread. When the caller is cancelled `stop` is called, which may make it end sooner."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop()
            await _wait_out(running)
            raise

    async def close(self) -> None:
        """Wait for the copies that run. May be called twice."""
        await asyncio.to_thread(self._threads.shutdown)


async def _wait_out(running: asyncio.Future[T]) -> None:
    """Wait for the end of a copy, whatever it is, through further cancellations."""
    while not running.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([running])
    if (error := running.exception()) is not None:
        log.debug("a copy whose caller was cancelled failed: %s", error)
