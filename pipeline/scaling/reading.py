"""A pool at one moment, read in one call: what the scripts counted, and what its workers say of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.connection import Connection, Script
from pipeline.keys import PoolKeys
from pipeline.queue import STAGES
from pipeline.said import WorkerSaid, said_by
from pipeline.snapshot import text, text_pairs

_script = Script("signals")


@dataclasses.dataclass(frozen=True, slots=True)
class StageReading:
    """`oldest_ms`: by lane, when the task came that waits longest; 0 where none does. `workers`: those that live."""

    oldest_ms: Mapping[str, int] = dataclasses.field(default_factory=dict)
    workers: Mapping[str, WorkerSaid] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A pool. Times in ms, of Redis. `decided`: what who scales it decided last (see `desire.lua`); empty where nobody does."""

    time_ms: int = 0
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, StageReading] = dataclasses.field(default_factory=dict)
    decided: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def count(self, *words: str) -> int:
        """A counter, such as `waiting:decode:low`; 0 where it was never counted, or a version before counted otherwise."""
        return max(0, self.counters.get(":".join(words), 0))


async def read(connection: Connection, keys: PoolKeys, stages: Sequence[str] = STAGES) -> Reading:
    """Read a pool. Raises RedisUnavailable."""
    time_ms, counters, decided, *found = await connection.call(_script, keys.root, *stages)
    return Reading(
        int(time_ms),
        {name: int(value) for name, value in text_pairs(counters).items()},
        {stage: _stage(*rows) for stage, rows in zip(stages, found, strict=True)},
        text_pairs(decided),
    )


def _stage(lanes: list[Any], workers: list[Any]) -> StageReading:
    return StageReading(
        {lane: int(came_ms) for lane, came_ms in _pairs(lanes)}, {name: said_by(info) for name, info in _pairs(workers)}
    )


def _pairs(row: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((text(name), value) for name, value in zip(row[::2], row[1::2], strict=True))
