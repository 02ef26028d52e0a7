"""`python -m workers prefill|decode|embed|batch|QUEUE`: one worker process. The only place here that wires parts together."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
import uvloop

import pipeline
from pipeline.config import PoolSettings, Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, ConfigError
from pipeline.exits import Exit, exit_for
from pipeline.ids import new_process_name
from pipeline.logs import configure
from pipeline.processes import die_with_parent
from pipeline.protocol import FinishReason, LLMEngineOutput
from pipeline.queue import BATCH, EMBED, STAGES
from pipeline.settings_file import add_arguments, settings_from
from pipeline.waiting import until_first
from workers import decode, embed, prefill, stages
from workers.banner import Rows, banner, embedding_rows, engine_rows, stage_rows
from workers.beat import beating
from workers.child import ChildEngine
from workers.control import WorkerControl, engine_told
from workers.departure import Departure
from workers.engine import EngineInfo
from workers.holdings import Held, Holdings
from workers.kv_events import KVEventWriter
from workers.stages import NoResources, StageCapacity, Stages, load_stages
from workers.steps import StepWriter
from workers.stops import StopStrings
from workers.supervisor import EngineCapacity, EngineSupervisor
from workers.transfers.ways.tcp.address import with_addresses
from workers.worker import Worker

log = structlog.get_logger("baton.worker")

ENGINE_STAGES = (*STAGES, EMBED)


def main() -> None:
    """Run a worker until a signal asks it to leave (see `workers/departure.py`)."""
    parser = argparse.ArgumentParser(
        prog="baton worker", description="Run one prefill, decode or embed worker, or one of a queue of one's own."
    )
    parser.add_argument("stage", help="prefill, decode, embed, batch, or (with --app) a queue of the app")
    parser.add_argument(
        "--app", default="", help="module with the tasks of a queue of one's own: mystages or mystages:stages"
    )
    parser.add_argument("-c", "--concurrency", type=int, help="tasks that run at once (worker.concurrency)")
    parser.add_argument("--pool", default="", help="the pool to serve (default: the only one in the configuration)")
    parser.add_argument("--name", default="", help="worker name (default: made from stage, host and process id)")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.parent:
        die_with_parent(arguments.parent)
    if arguments.concurrency is not None:
        arguments.overrides.append(f"worker.concurrency={arguments.concurrency}")
    try:
        app = app_of(arguments.stage, arguments.app)
        settings = settings_from(arguments, os.environ)
        name = arguments.name or new_process_name(arguments.stage)
        configure(settings.log, name)
        if arguments.stage == BATCH:
            from workers.batch import worker  # rq and tokenizers: workers with engines do without

            worker.serve(settings, name)
            return
        pool = only_pool(settings, arguments.pool)
        check_embeds(settings.pools[pool], pool, arguments.stage, has_app=app is not None)
        if app is None:
            uvloop.run(run(settings, pool, arguments.stage, name))
        else:
            uvloop.run(run_stages(settings, pool, arguments.stage, name, app))
    except BatonError as error:
        sys.stderr.write(f"baton worker: {error}\n")
        sys.exit(exit_for(error))


def app_of(stage: str, app: str) -> Stages | None:
    """The tasks of a queue of one's own; None for Baton's own stages. Raises `ConfigError` where the two do not fit."""
    if app and stage in (*STAGES, BATCH):
        raise ConfigError(f"--app {app}: a {stage} worker runs Baton's own task; leave it out")
    if not app and stage in (*ENGINE_STAGES, BATCH):
        return None
    if not app:
        raise ConfigError(f"{stage} is none of {', '.join(ENGINE_STAGES)}: a queue of one's own needs --app MODULE")
    stages = load_stages(app)
    stages.on(stage)
    return stages


def check_embeds(settings: PoolSettings, pool: str, stage: str, *, has_app: bool) -> None:
    """Raises `ConfigError` where the queue `embed` is not for whom this worker would work."""
    if stage != EMBED or settings.embeddings != has_app:
        return
    if has_app:
        raise ConfigError(
            f"--app: pools.{pool}.embeddings is true, so its queue {EMBED} is Baton's own: name yours otherwise"
        )
    raise ConfigError(
        f"pools.{pool}.embeddings is false, so nothing would come: set it to true for the API and this worker"
    )


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
    exports = stage == "prefill"
    transfer = await with_addresses(settings.transfer, settings.redis.url) if exports else settings.transfer
    engine = ChildEngine(name, pool_settings, settings.engine, transfer, exports=exports, embeds=stage == EMBED)
    stops = StopStrings(pool_settings)
    connection = Connection(settings.redis)
    supervisor = EngineSupervisor(
        engine, holdings, settings.worker, on_outputs=lambda outputs: take(outputs), on_change=lambda: worker.wake()
    )
    worker = Worker(
        connection, pool, name, settings.worker, settings.queue, holdings=holdings, resources=engine,
        capacity=EngineCapacity(
            engine, holdings, lambda: supervisor.is_up, stage=stage,
            is_paused=lambda: control.is_paused, is_leaving=lambda: worker.is_draining,
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
    kv_events = KVEventWriter(connection, pool, name)

    async def take(outputs: list[LLMEngineOutput]) -> None:
        kept = stops.cut_all(outputs)
        steps.put(kept)
        for output in kept:
            if output.finish_reason is FinishReason.STOP:  # of a stop string the engine knows nothing: it would go on
                await engine.cancel(output.request_id, output.choice)

    if stage == "prefill":
        prefill.register(worker, engine, stops)
    elif stage == EMBED:
        embed.register(worker, engine)
    else:
        decode.register(worker, engine, holdings, stops)
    try:
        async with beating(settings.worker.beat_dir, lambda: supervisor.is_up and worker.is_at_work):
            if await departure.unless_asked(connection.reach()) and await departure.unless_asked(supervisor.start()):
                _show(settings, banner(
                    name, pool, stage, redis_url=settings.redis.url, lanes=worker.lanes, tasks=worker.tasks,
                    version=pipeline.__version__, rows=rows_of(stage, engine.info, settings),
                ))  # fmt: skip
                departure.lead(worker.drain, worker.leave_now)
                await _work(worker, supervisor.run(), steps.run(), control.run(), kv_events.run(engine))
    finally:
        await supervisor.close()
        await connection.close()


def rows_of(stage: str, info: EngineInfo, settings: Settings) -> Rows:
    """What the banner tells of the engine."""
    return embedding_rows(info) if stage == EMBED else engine_rows(info, settings.transfer.kind)


def _show(settings: Settings, text: str) -> None:
    if settings.log.format == "console":
        sys.stderr.write(f"{text}\n")  # where the log goes, so that the two keep their order
        sys.stderr.flush()


async def run_stages(settings: Settings, pool: str, queue: str, name: str, app: Stages) -> None:
    """Run the tasks of a queue of one's own here, without an engine, until drained."""
    tasks, holdings = app.on(queue), Holdings()
    connection = Connection(settings.redis)
    capacity = StageCapacity(queue, tasks, holdings, settings.worker.concurrency, is_paused=lambda: control.is_paused)
    worker = Worker(
        connection, pool, name, settings.worker, settings.queue, holdings=holdings, resources=NoResources(),
        capacity=capacity,
    )  # fmt: skip
    control = WorkerControl(connection, worker, holdings, capacity.told, redis_url=settings.redis.url)
    departure = Departure(lambda: 0)
    departure.install()

    async def stop(held: Held, why: str) -> None:
        held.drop(why)

    steps = StepWriter(worker.queue, name, holdings, stop=stop)
    threads = ThreadPoolExecutor(settings.worker.concurrency, thread_name_prefix=queue)
    stages.register(worker, tasks, holdings, steps, threads)
    try:
        async with beating(settings.worker.beat_dir, lambda: worker.is_at_work):
            if await departure.unless_asked(connection.reach()):
                _show(settings, banner(
                    name, pool, queue, redis_url=settings.redis.url, lanes=worker.lanes, tasks=worker.tasks,
                    version=pipeline.__version__, rows=stage_rows(queue, settings.worker.concurrency),
                ))  # fmt: skip
                departure.lead(worker.drain, worker.leave_now)
                await _work(worker, steps.run(), control.run())
    finally:
        await connection.close()
        threads.shutdown(wait=False)
    if worker.is_stuck:  # leaving in good order would wait for the handler; nothing was lost, a new process may start
        sys.stderr.flush()
        os._exit(Exit.TASK_STUCK)


async def _work(worker: Worker, *beside: Coroutine[Any, Any, None]) -> None:
    """Until the worker is drained; what runs beside it must not end before."""
    await until_first([asyncio.create_task(work) for work in (worker.run(), *beside)])


if __name__ == "__main__":
    main()
