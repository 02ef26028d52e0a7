"""`python -m workers prefill|decode`: one worker process of one pool. The only place here that wires parts together."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any

import structlog
import uvloop

import pipeline
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, ConfigError
from pipeline.ids import new_process_name
from pipeline.logs import configure
from pipeline.processes import die_with_parent
from pipeline.protocol import FinishReason, LLMEngineOutput
from pipeline.settings_file import add_arguments, settings_from
from workers import decode, prefill
from workers.banner import banner
from workers.child import ChildEngine
from workers.control import WorkerControl, engine_told
from workers.departure import Departure
from workers.holdings import Held, Holdings
from workers.steps import StepWriter
from workers.stops import StopStrings
from workers.supervisor import EngineCapacity, EngineSupervisor
from workers.worker import Worker

log = structlog.get_logger("baton.worker")


def main() -> None:
    """Run a worker until a signal asks it to leave (see `workers/departure.py`)."""
    parser = argparse.ArgumentParser(prog="baton worker", description="Run one prefill or decode worker.")
    parser.add_argument("stage", choices=("prefill", "decode"))
    parser.add_argument("--pool", default="", help="the pool to serve (default: the only one in the configuration)")
    parser.add_argument("--name", default="", help="worker name (default: made from stage, host and process id)")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.parent:
        die_with_parent(arguments.parent)
    try:
        settings = settings_from(arguments, os.environ)
        name = arguments.name or new_process_name(arguments.stage)
        configure(settings.log, name)
        pool = only_pool(settings, arguments.pool)
        uvloop.run(run(settings, pool, arguments.stage, name))
    except BatonError as error:
        sys.exit(f"baton worker: {error}")


def only_pool(settings: Settings, wanted: str) -> str:
    """The pool to serve. Raises `ConfigError` listing what there is."""
    if wanted in settings.pools:
        return wanted
    if not wanted and len(settings.pools) == 1:
        return next(iter(settings.pools))
    raise ConfigError(f"which pool? --pool {wanted!r} is none of {sorted(settings.pools)}")


async def run(settings: Settings, pool: str, stage: str, name: str) -> None:
    """Start the engine, work until drained, close everything."""
    pool_settings = settings.pools[pool]
    holdings = Holdings()
    engine = ChildEngine(name, pool_settings, settings.engine, settings.transfer, exports=stage == "prefill")
    stops = StopStrings(pool_settings.tokenizer or pool_settings.model)
    connection = Connection(settings.redis)
    supervisor = EngineSupervisor(
        engine, holdings, settings.worker, on_outputs=lambda outputs: take(outputs), on_change=lambda: worker.wake()
    )
    worker = Worker(
        connection, pool, name, settings.worker, settings.queue, holdings=holdings, resources=engine,
        capacity=EngineCapacity(
            engine, holdings, lambda: supervisor.is_up, stage=stage, is_paused=lambda: control.is_paused
        ),
    )  # fmt: skip
    control = WorkerControl(
        connection, worker, holdings, lambda: engine_told(engine, worker), redis_url=settings.redis.url
    )
    departure = Departure(lambda: engine.pid)
    departure.install()

    async def stop(held: Held, why: str) -> None:
        await engine.cancel(held.key)
        held.drop(why)

    steps = StepWriter(worker.queue, name, holdings, stop=stop)

    async def take(outputs: list[LLMEngineOutput]) -> None:
        kept = stops.cut_all(outputs)
        steps.put(kept)
        for output in kept:
            if output.finish_reason is FinishReason.STOP:  # of a stop string the engine knows nothing: it would go on
                await engine.cancel(output.request_id, output.choice)

    if stage == "prefill":
        prefill.register(worker, engine, stops)
    else:
        decode.register(worker, engine, holdings, stops)
    try:
        if await departure.unless_asked(supervisor.start()):
            if settings.log.format == "console":
                _show(banner(
                    name, pool, stage, redis_url=settings.redis.url, engine=engine.info, transfer=settings.transfer.kind,
                    lanes=worker.lanes, version=pipeline.__version__,
                ))  # fmt: skip
            departure.lead(worker.drain, worker.leave_now)
            await _work(worker, supervisor.run(), steps.run(), control.run())
    finally:
        await supervisor.close()
        await connection.close()


def _show(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # where the log goes, so that the two keep their order
    sys.stderr.flush()


async def _work(worker: Worker, *beside: Coroutine[Any, Any, None]) -> None:
    """Until the worker is drained; what runs beside it must not end before."""
    background = [asyncio.create_task(work) for work in beside]
    working = asyncio.create_task(worker.run())
    try:
        done, _ = await asyncio.wait([working, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (working, *background):
            task.cancel()
        await asyncio.gather(working, *background, return_exceptions=True)


if __name__ == "__main__":
    main()
