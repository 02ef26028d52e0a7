"""What Redis says of a pool without asking anybody: its lanes and what waits there, and where one request stands.

Everything here only reads, and looks at a bounded part of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.connection import Connection
from pipeline.ids import pool_of
from pipeline.keys import PoolKeys
from pipeline.protocol import Timeline
from pipeline.queue import LANES
from pipeline.snapshot import stages_of, text, text_pairs

_FIELDS = (
    "state", "reason", "stage", "lane", "owner", "epoch", "attempts", "tokens", "n", "deadline", "handle_owner", "replay_of"
)  # fmt: skip

LOOKED_AT = 256  # entries of a lane that are looked at


class WaitingTask(msgspec.Struct, frozen=True):
    """A task that waits on a lane."""

    id: str
    stage: str
    lane: str
    prompt_tokens: int
    seconds: float  # since it came to this lane


class LaneState(msgspec.Struct, frozen=True):
    """A lane now; `oldest_s` is None when nothing waits."""

    stage: str
    lane: str
    waiting: int
    prompt_tokens: int
    oldest_s: float | None


class TaskState(msgspec.Struct, frozen=True):
    """Where a request stands; `timeline` in microseconds of Redis's clock, 0 where it did not happen."""

    id: str
    state: str
    reason: str
    stage: str
    lane: str
    owner: str
    epoch: int
    attempts: int
    prompt_tokens: int
    tokens: list[int]  # in the log, by choice
    deadline_ms: int
    handle_owner: str
    replay_of: str
    timeline: Timeline


async def waiting_tasks(connection: Connection, keys: PoolKeys, stage: str, lane: str) -> list[WaitingTask]:
    """What waits on a lane, oldest first. Raises `RedisUnavailable`."""
    key = keys.lane(stage, lane)
    (seconds, micros), entries = await connection.commands(("TIME",), ("XRANGE", key, "-", "+", "COUNT", LOOKED_AT))
    rows = [(text(entry), text_pairs(fields)) for entry, fields in entries]
    rows = [(entry, fields) for entry, fields in rows if "id" in fields]
    if not rows:
        return []
    now_ms = int(seconds) * 1000 + int(micros) / 1000
    places = await connection.commands(
        *(("HMGET", keys.request(fields["id"]), "state", "stage", "lane", "entry") for _, fields in rows)
    )
    here = [b"queued", stage.encode(), lane.encode()]
    return [
        WaitingTask(
            fields["id"], stage, lane, int(fields.get("tokens", 0)),
            round(max(0.0, now_ms - int(entry.partition("-")[0])) / 1000, 3),
        )
        for (entry, fields), place in zip(rows, places, strict=True)
        if list(place) == [*here, entry.encode()]
    ]  # fmt: skip


async def lane_states(connection: Connection, keys: PoolKeys, workers: Sequence[str] = ()) -> list[LaneState]:
    """The lanes of all stages; with `workers`, only those that one of them reads. Raises `RedisUnavailable`."""
    states = []
    for stage in await stages_of(connection, keys):
        names = [text(name) for name in await connection.command("ZRANGE", keys.alive(stage), 0, -1)]
        if workers:
            names = [name for name in names if name in workers]
        lanes = [*LANES, *(f"@{name}" for name in names)] if names or not workers else []
        states += [await _lane_state(connection, keys, stage, lane) for lane in lanes]
    return states


async def _lane_state(connection: Connection, keys: PoolKeys, stage: str, lane: str) -> LaneState:
    fields = f"waiting:{stage}:{lane}", f"tokens:{stage}:{lane}"
    waiting, tokens = await connection.command("HMGET", keys.counters(), *fields)
    oldest = await waiting_tasks(connection, keys, stage, lane) if int(waiting or 0) else []
    return LaneState(stage, lane, int(waiting or 0), int(tokens or 0), oldest[0].seconds if oldest else None)


async def task_state(connection: Connection, request_id: str) -> TaskState | None:
    """Where a request stands, or None when Redis knows nothing of it (any more). Raises `RedisUnavailable`."""
    keys = PoolKeys(pool_of(request_id))
    times = Timeline.__struct_fields__
    names = (*_FIELDS, *(f"t_{name}" for name in times))  # not the whole hash: body and handle are bytes, and large
    values = await connection.command("HMGET", keys.request(request_id), *names)
    h = {name: text(value) for name, value in zip(names, values, strict=True) if value is not None}
    if "state" not in h:
        return None
    choices = range(int(h.get("n", 1)))
    lengths = await connection.commands(*(("STRLEN", keys.log(request_id, choice)) for choice in choices))
    return TaskState(
        id=request_id, state=h["state"], reason=h.get("reason", ""), stage=h.get("stage", ""), lane=h.get("lane", ""),
        owner=h.get("owner", ""), epoch=int(h.get("epoch", 0)), attempts=int(h.get("attempts", 0)),
        prompt_tokens=int(h.get("tokens", 0)), tokens=[int(length) // 4 for length in lengths],
        deadline_ms=int(h.get("deadline", 0)), handle_owner=h.get("handle_owner", ""), replay_of=h.get("replay_of", ""),
        timeline=Timeline(*(int(h.get(f"t_{name}", 0)) for name in times)),
    )  # fmt: skip


def as_dict(state: TaskState) -> dict[str, Any]:
    """For programs: the timeline's times by name, where they happened."""
    times = {name: us for name, us in msgspec.structs.asdict(state.timeline).items() if us}
    return {**msgspec.structs.asdict(state), "timeline": times}
