"""What a pool looks like now, read in two or three round trips and kept fresh in the background."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import msgspec

from pipeline.config import RouterSettings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.keys import PoolKeys
from pipeline.protocol import BellNote
from pipeline.queue import STAGES
from pipeline.routing import PoolLoad, Room
from pipeline.said import WorkerSaid, said_by

ROLES = (*STAGES, "api")  # of every pool; stages of one's own are in its `stages`


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """One reading. `workers` holds living processes by role: name -> what it says of itself."""

    time_ms: int = 0
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    workers: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)

    def total(self, prefix: str) -> int:
        """Sum of all counters whose name begins with `prefix`."""
        return sum(value for name, value in self.counters.items() if name.startswith(prefix))

    def worker_names(self) -> list[str]:
        """The living workers of all stages."""
        return [name for role, names in self.workers.items() if role != "api" for name in names]

    def all_paused(self, stage: str) -> bool:
        """Whether a stage has workers, and each was told to claim nothing."""
        said = self.workers.get(stage, {}).values()
        return bool(said) and all(said_by(info).paused for info in said)

    def own_queues(self) -> list[str]:
        """The stages of one's own that have or had a worker or work."""
        waiting = {name.split(":")[1] for name in self.counters if name.startswith("waiting:")}
        return _own([*self.workers, *waiting])

    def waiting(self, stage: str, lane: str = "") -> int:
        """Tasks that wait in a stage, on one lane or on all."""
        return self.counters.get(f"waiting:{stage}:{lane}", 0) if lane else self.total(f"waiting:{stage}:")

    def running(self, stage: str, lane: str) -> int:
        """What workers have in hand of a stage and a priority: choices in decode, tasks elsewhere."""
        return max(0, self.counters.get(f"running:{stage}:{lane}", 0))

    def load(self) -> PoolLoad:
        """The router's view."""
        alive = {role: len(self.workers.get(role, {})) for role in ROLES}
        told = [_room(said_by(info)) for info in self.workers.get("prefill", {}).values()]
        rooms = tuple(room for room in told if room is not None)
        is_whole = len(rooms) == len(told)
        return PoolLoad(self.waiting("prefill"), alive["prefill"], alive["decode"], rooms if is_whole else ())

    def router(self, initial: RouterSettings) -> RouterSettings:
        """Router settings: those changed at run time over the initial ones. Raises `ConfigError` naming the key."""
        changed = {name: value for name, value in self.settings.items() if name in RouterSettings.__struct_fields__}
        try:
            return msgspec.convert({**msgspec.to_builtins(initial), **changed}, RouterSettings, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"router settings in Redis: {error}") from error


async def take_snapshot(connection: Connection, keys: PoolKeys) -> PoolSnapshot:
    """Read a pool. Raises `RedisUnavailable`."""
    rows = await connection.commands(
        ("TIME",),
        ("HGETALL", keys.counters()),
        ("HGETALL", keys.settings()),
        ("SMEMBERS", keys.stages()),
        *(_alive(keys, role) for role in ROLES),
    )
    now_ms = int(rows[0][0]) * 1000 + int(rows[0][1]) // 1000
    own, alive = _own(rows[3]), rows[4:]
    if own:
        alive = [*alive, *await connection.commands(*(_alive(keys, stage) for stage in own))]
    workers = {role: _living(row, now_ms) for role, row in zip((*ROLES, *own), alive, strict=True)}
    names = [name for role in workers if role != "api" for name in workers[role]]
    infos = await connection.commands(*(("HGET", keys.worker(name), "info") for name in names)) if names else []
    said = dict(zip(names, infos, strict=True))
    return PoolSnapshot(
        time_ms=now_ms,
        counters={name: int(value) for name, value in text_pairs(rows[1]).items()},
        settings=text_pairs(rows[2]),
        workers={role: {name: said.get(name) or b"" for name in workers[role]} for role in workers},
    )


async def stages_of(connection: Connection, keys: PoolKeys) -> list[str]:
    """All stages that the pool has or had work for: Baton's own, then those of one's own. Raises `RedisUnavailable`."""
    return [*STAGES, *_own(await connection.command("SMEMBERS", keys.stages()))]


def _own(stages: Iterable[object]) -> list[str]:
    return sorted({text(stage) for stage in stages} - set(ROLES))


def _alive(keys: PoolKeys, role: str) -> tuple[str, str, int, int, str]:
    return ("ZRANGE", keys.alive(role), 0, -1, "WITHSCORES")


async def set_router(connection: Connection, keys: PoolKeys, changes: Mapping[str, int]) -> None:
    """Set router settings for all API processes; they hear the bell and read them at once."""
    await connection.command("HSET", keys.settings(), *(word for pair in changes.items() for word in pair))
    await connection.command("PUBLISH", keys.bell("pool"), msgspec.msgpack.encode(BellNote("pool")))


def _room(said: WorkerSaid) -> Room | None:
    """The largest task that a worker could start; None when it has not said."""
    if said.total_blocks is None or not said.engine.block_size:
        return None
    return Room(said.total_blocks, said.engine.block_size)


def _living(row: list[object], now_ms: int) -> list[str]:
    pairs = zip(*[iter(_flat(row))] * 2, strict=True)
    return [text(name) for name, score in pairs if float(text(score)) >= now_ms]


def text_pairs(row: object) -> dict[str, str]:
    """A hash, or the fields of a stream's entry, as redis-py gives them: a dict, or a flat list."""
    if isinstance(row, dict):
        return {text(name): text(value) for name, value in row.items()}
    assert isinstance(row, list)
    return {text(name): text(value) for name, value in zip(*[iter(row)] * 2, strict=True)}


def _flat(row: list[object]) -> list[object]:
    return [part for item in row for part in (item if isinstance(item, (list, tuple)) else (item,))]


def text(value: object) -> str:
    """A value of Redis as text."""
    return value.decode() if isinstance(value, bytes) else str(value)
