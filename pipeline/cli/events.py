"""`baton events`: one line an event as it happens, as `celery events --dump` writes them, until Ctrl-C."""

from __future__ import annotations

import datetime
import json
import sys

import msgspec

from pipeline.cli.options import Given
from pipeline.cli.pools import connected
from pipeline.events import Event, listen

WORKER_WORDS = {"worker-online": "started", "worker-offline": "shutdown", "worker-heartbeat": "heartbeat"}


async def dump_events(source: Given, pool: str | None, *, in_json: bool) -> None:
    """Until interrupted."""
    async with connected(source, pool) as place:
        events = await listen(place.connection, place.pools)
        print("-> evdump: starting capture...", file=sys.stderr, flush=True)
        async for name, event in events:
            print(as_json(name, event) if in_json else as_line(event), flush=True)


def as_json(pool: str, event: Event) -> str:
    """For programs."""
    return json.dumps({"pool": pool, **msgspec.structs.asdict(event)})


def as_line(event: Event) -> str:
    """`decode-1 [2026-11-22 10:00:00.123456+00:00] task started: decode(id) lane=default`."""
    when = datetime.datetime.fromtimestamp(event.time_us / 1e6, datetime.UTC)
    words = WORKER_WORDS.get(event.type, event.type.replace("-", " "))
    who = f"{event.stage}({event.id})" if event.id else f"stage={event.stage}"
    rest = [f"lane={event.lane}"] if event.lane else []
    rest += [event.detail] if event.detail else []
    return " ".join([event.worker or "-", f"[{when}]", f"{words}:", who, *rest])
