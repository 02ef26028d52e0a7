"""What happens to tasks and workers, as it happens. The scripts publish it; who does not listen misses it, and nothing depends on it.

task-sent -> task-started -> task-handed-over -> task-started -> task-succeeded, or task-failed, task-revoked, task-expired,
task-rejected (dead-lettered); task-retried on the way; worker-online, worker-offline; stage-scaled (how many workers it should have).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec
import structlog

from pipeline.connection import Connection, Subscription
from pipeline.keys import PoolKeys
from pipeline.protocol import UNREADABLE

log = structlog.get_logger("baton.events")


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One event. Types and detail are words for people and filters: new ones may come at any time."""

    type: str
    id: str  # the request; empty for a worker's event
    stage: str
    lane: str
    worker: str
    time_us: int  # Redis TIME
    detail: str = ""


async def listen(connection: Connection, pools: Sequence[str]) -> AsyncIterator[tuple[str, Event]]:
    """(pool, event) of these pools, from the moment in which this returns. Raises `RedisUnavailable`.

    A lost line to Redis costs what happens meanwhile; that is logged.
    """
    channels = {PoolKeys(pool).events(): pool for pool in pools}
    return _decoded(await connection.subscribe(*channels), channels)


async def _decoded(subscription: Subscription, pools: Mapping[str, str]) -> AsyncIterator[tuple[str, Event]]:
    decode = msgspec.msgpack.Decoder(Event).decode
    async for channel, data in subscription.messages():
        if data is None:
            log.warning("listening anew, events may be missing", channel=channel)
            continue
        try:
            yield pools[channel], decode(data)
        except UNREADABLE as error:
            log.error("event is not readable, left out", channel=channel, error=str(error))
