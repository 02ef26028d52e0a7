"""Waits that end: for an event, for the time that it may take, for the first of several tasks, or for a call that blocks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_at_most(event: asyncio.Event, limit_s: float) -> None:
    """Return when the event is set or `limit_s` is over; a cancellation is never lost in it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()


async def until_first(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait until one of these ends, or the caller is cancelled: none of them goes on then. Raises what the one that ended raised."""
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(limit_s: float, function: Callable[..., T], *args: Any) -> T:
    """A call that blocks, for as long as it may take; one that takes longer is left to itself, and its end is of no interest. Raises
    TimeoutError."""
    async with asyncio.timeout(limit_s):
        return await asyncio.shield(begun_in_thread(function, *args))


def begun_in_thread(function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """A call in a thread of its own: one that hangs holds up nothing else, and no process that leaves, as a pool of threads would."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001  # told to who waits
            future.set_exception(error)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    call = asyncio.wrap_future(future)
    left_alone(call)
    return call


def left_alone(call: asyncio.Future[Any]) -> None:
    """It may outlast who waits for it; that it fails then is no error."""
    call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
