"""Waits that end: for an event, or for the time that it may take."""

from __future__ import annotations

import asyncio
import contextlib


async def wait_at_most(event: asyncio.Event, limit_s: float) -> None:
    """Return when the event is set or `limit_s` is over; a cancellation is never lost in it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
