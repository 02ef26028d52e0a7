"""`baton autoscale`: as many prefill and decode workers on this machine as each pool needs now, until Ctrl-C.

1. Redis: the one of the settings, else that of the `baton up` in this folder.
2. The pools are ours, each by a lease: who finds one taken says by whom and starts nothing.
3. A supervisor for each pool, until SIGINT or SIGTERM, or until another process has a pool.
4. All workers go in order; a second signal kills them. They never outlive this process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pipeline.cli.children import Lines, LogFiles, Terminal
from pipeline.cli.gpus import Gpus
from pipeline.cli.options import Given
from pipeline.cli.stopping import until_stopped
from pipeline.cli.supervisor import PoolSupervisor
from pipeline.cli.worker_processes import WorkerProcesses
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import ConfigError
from pipeline.exits import Exit
from pipeline.queue import STAGES
from pipeline.redis_server import running_redis
from pipeline.scaling.policy import Decision, check
from pipeline.scaling.watch import PoolWatch
from pipeline.settings_file import nearest
from pipeline.waiting import until_first


async def run_autoscale(source: Given, pools: Sequence[str], *, explain: bool) -> int:
    """Runs until it is told to stop; returns the exit code."""
    return await Autoscale(source, chosen_pools(source.settings(), pools), explain=explain).run()


async def show_decisions(source: Given, pools: Sequence[str], *, once: bool, as_json: bool) -> None:
    """Prints what would be decided, and starts nothing. Two readings make the first decision: rates lie between them."""
    settings = source.settings()
    check(settings.autoscale)
    connection = Connection(running_redis(settings.redis))
    try:
        watches = [PoolWatch(connection, pool, settings.autoscale) for pool in chosen_pools(settings, pools)]
        has_shown = False
        while not (once and has_shown):
            for watch in watches:
                if (look := await watch.look()) is not None:
                    _show(watch.pool, look.decision, as_json=as_json)
                    has_shown = True
            await asyncio.sleep(0 if once and has_shown else settings.autoscale.poll_s)
    finally:
        await connection.close()


def _show(pool: str, decision: Decision, *, as_json: bool) -> None:
    for stage, line in zip(STAGES, decision.lines(), strict=True):
        row = {"pool": pool, "stage": stage, **dataclasses.asdict(decision.stage(stage))}
        print(json.dumps(row) if as_json else f"{pool}: {line}", flush=True)


def chosen_pools(settings: Settings, pools: Sequence[str]) -> list[str]:
    """Those that are named, else all. Raises ConfigError."""
    for pool in pools:
        if pool not in settings.pools:
            raise ConfigError(f"--pool: unknown pool {pool}{nearest(pool, settings.pools)}")
    return list(dict.fromkeys(pools or settings.pools))


class Autoscale:
    """One run. See the module's docstring."""

    def __init__(self, source: Given, pools: Sequence[str], *, explain: bool) -> None:
        self._source = source
        self._settings = settings = source.settings()
        check(settings.autoscale)
        self._pools = pools
        self._explain = explain
        self._redis = running_redis(settings.redis)
        self._terminal = Terminal(["autoscale"])
        self._supervisors: list[PoolSupervisor] = []

    async def run(self) -> int:
        """Takes the pools, scales them, drains; returns the exit code."""
        async with self._connected() as connection:
            code = await until_stopped(self._scale(connection), self._drain, self._kill, self._say)
        if code in (Exit.OK, Exit.INTERRUPTED):
            self._say("stopped")
        return code

    async def _scale(self, connection: Connection) -> None:
        await connection.reach()
        processes = WorkerProcesses(
            self._module,
            self._connected,
            self._lines(),
            self._say,
            max_attempts=self._settings.worker.max_attempts,
            batches=self._settings.batches,
        )
        chosen = supervisors(self._settings, self._pools, connection, processes, self._say, explain=self._explain)
        for supervisor in chosen:
            await supervisor.take()
            self._supervisors.append(supervisor)
        self._say(f"scales {', '.join(self._pools)}; Ctrl-C lets all workers go in order")
        await run_all(self._supervisors)

    async def _drain(self) -> None:
        if self._supervisors:
            self._say("workers finish what they hold (Ctrl-C again kills)")
        await drain_all(self._supervisors)

    def _kill(self) -> None:
        self._say("killing all workers")
        for supervisor in self._supervisors:
            supervisor.kill()

    # -- pieces -----------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._terminal.line("autoscale", text)

    def _lines(self) -> Lines:
        folder = self._settings.autoscale.log_dir
        return LogFiles(Path(folder)) if folder else self._terminal

    def _module(self, *words: str) -> list[str]:
        joined = ["--set", f"redis.url={self._redis.url}"]
        return [sys.executable, "-m", *words, *self._source.arguments(), *joined]

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = Connection(self._redis)
        try:
            yield connection
        finally:
            await connection.close()


def supervisors(
    settings: Settings, pools: Sequence[str], connection: Connection, processes: WorkerProcesses,
    say: Callable[[str], None], *, explain: bool = False,
) -> list[PoolSupervisor]:  # fmt: skip
    """One for each pool; they share the GPUs of this machine."""
    gpus = Gpus(settings.autoscale.device_names)
    return [
        PoolSupervisor(
            pool, settings.autoscale, connection, processes, gpus, say,
            drain_s=settings.worker.drain_s, lease_s=settings.worker.lease_s,
            prefix=f"{pool}." if len(settings.pools) > 1 else "", explain=explain,
        )
        for pool in pools
    ]  # fmt: skip


async def run_all(supervisors: Sequence[PoolSupervisor]) -> None:
    """Until cancelled or one of them fails. Raises PoolTaken. Their workers go on: `drain_all` comes next."""
    await until_first([asyncio.create_task(supervisor.run()) for supervisor in supervisors])


async def drain_all(supervisors: Sequence[PoolSupervisor]) -> None:
    """All their workers go, pool by pool at once, each in order."""
    for failed in await asyncio.gather(*(supervisor.drain() for supervisor in supervisors), return_exceptions=True):
        if failed is not None:
            raise failed
