"""The worker processes of one command: how each is called and started, and what is said to Redis when one has died.

`baton up` and `baton autoscale` both have such workers; how many, and until when, is theirs.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from pipeline.batches.records import BatchRecords
from pipeline.cli.children import Child, Lines
from pipeline.config import BatchesSettings
from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.queue import BATCH, PoolQueue
from pipeline.wording import counted

Connected = Callable[[], AbstractAsyncContextManager[Connection]]


class WorkerPlace(NamedTuple):
    """Where a worker stands; `label` is its name on the terminal. A batch worker is of no pool."""

    pool: str
    stage: str
    number: int
    label: str


@dataclasses.dataclass(eq=False)
class Worker:
    """A worker's process and the name that it was started with last."""

    place: WorkerPlace
    child: Child
    name: str = ""


class WorkerProcesses:
    """Makes workers. `module` is the command line of a module with the settings of this command."""

    def __init__(
        self, module: Callable[..., list[str]], connected: Connected, lines: Lines, say: Callable[[str], None], *,
        max_attempts: int, batches: BatchesSettings,
    ) -> None:  # fmt: skip
        self._module = module
        self._connected = connected
        self._lines = lines
        self._say = say
        self._max_attempts = max_attempts
        self._batches = batches

    def make(self, place: WorkerPlace, environment: Mapping[str, str] | None = None) -> Worker:
        """A worker that is not started yet; it has a new name with each start, never to be taken for its predecessor."""

        def command() -> list[str]:
            worker.name = f"{place.stage}-{place.number}-{secrets.token_hex(3)}"
            pool = ["--pool", place.pool] if place.pool else []
            return self._module("workers", place.stage, *pool, "--name", worker.name)

        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        worker = Worker(place, Child(place.label, command, environment, self._lines))
        return worker

    async def give_back_tasks_of(self, worker: Worker) -> None:
        """What a dead worker held waits again now, not when its leases run out."""
        await self.give_back(worker.place.pool, worker.place.stage, worker.name)

    async def give_back(self, pool: str, stage: str, name: str) -> None:
        """The same for a worker that is known by its name alone."""
        try:
            async with self._connected() as connection:
                held = await self._given_back(connection, pool, stage, name)
        except BatonError as error:
            self._say(f"{name}: what it held waits for its lease to run out: {error}")
            return
        if held:
            self._say(f"{name} held {held}: waiting for another worker")

    async def _given_back(self, connection: Connection, pool: str, stage: str, name: str) -> str:
        """What it was, in words."""
        if stage == BATCH:
            records = BatchRecords.of(connection, self._batches)
            return ", ".join(await records.evict(name))
        count = await PoolQueue(connection, pool).evict(stage, name, max_attempts=self._max_attempts)
        return counted(count, "task") if count else ""
