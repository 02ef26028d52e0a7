"""What rq runs: one batch, in a process of its own that was forked for it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from typing import Any

import structlog
from rq import get_current_job
from rq.job import Job

from pipeline.batches.jobs import RETRIES
from pipeline.batches.records import BatchRecords, Fenced, Hold, NotTaken, holder_name
from pipeline.blocking import answering
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, RedisUnavailable
from pipeline.files.store import FileStore
from pipeline.key_store import KeyStore
from pipeline.pools import open_pool
from pipeline.surface.endpoints import Asker
from pipeline.waiting import begun_in_thread
from workers.batch.owner import cancel_when_revoked
from workers.batch.run import BatchRun
from workers.batch.sending import LANE
from workers.batch.tidy import Leftovers

TAKE_AGAIN_S = 0.5
TELL_S = 2.0
LONGEST_BACKOFF_S = 30.0

log = structlog.get_logger("baton.batches")

_configured: list[tuple[Settings, str]] = []  # of the worker's process, which forks those of its jobs


class HandedBack(Exception):
    """The worker leaves; rq gives the job to another one."""


def configure(settings: Settings, worker: str) -> None:
    """What jobs of this process run with, and the name of their worker."""
    _configured[:] = [(settings, worker)]


def run_batch(*, batch_id: str) -> str:
    """Bring a batch to its end. Returns what became of the work. Raises HandedBack when the worker leaves before."""
    settings, worker = _configured[0]
    name = holder_name(worker, secrets.token_hex(4))
    return asyncio.run(_run(settings, batch_id, name, backoff_s(get_current_job())))


def backoff_s(job: Job | None) -> float:
    """How long a job waits that is not run for the first time: the one before died, or raised."""
    before = RETRIES - job.retries_left if job is not None and job.retries_left is not None else 0
    return min(LONGEST_BACKOFF_S, 2.0 ** (before - 1)) if before > 0 else 0.0


async def _run(settings: Settings, batch_id: str, name: str, wait_s: float) -> str:
    leaving = asyncio.current_task()
    assert leaving is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.cancel)
    try:
        async with contextlib.AsyncExitStack() as stack:
            connection = Connection(settings.redis)
            stack.push_async_callback(connection.close)
            await connection.reach()
            of_batches = settings.batches
            records = BatchRecords.of(connection, of_batches)
            hold = await _take(records, batch_id, name, of_batches.lease_s)
            if isinstance(hold, NotTaken):
                return hold.why
            stack.push_async_callback(_let_go, records, hold)
            return await _bring_to_end(settings, connection, records, hold, wait_s, stack)
    except asyncio.CancelledError:
        log.info("batch handed back", batch_id=batch_id)
        raise HandedBack(batch_id) from None


async def _take(records: BatchRecords, batch_id: str, name: str, lease_s: float) -> Hold | NotTaken:
    """Take the batch up; where a lease of somebody who may be dead is in the way, once that is over. Who has it for longer lives."""
    give_up_s = time.monotonic() + lease_s + 2 * TAKE_AGAIN_S
    while True:
        taken = await records.take(batch_id, name)
        if isinstance(taken, Hold) or taken.why != "held" or time.monotonic() > give_up_s:
            return taken
        await asyncio.sleep(TAKE_AGAIN_S)


async def _bring_to_end(
    settings: Settings, connection: Connection, records: BatchRecords, hold: Hold, wait_s: float, stack: contextlib.AsyncExitStack
) -> str:  # fmt: skip
    log.info("batch taken up", batch_id=hold.batch_id, epoch=hold.epoch)
    record = await records.find(hold.batch_id)
    if record is None:
        return "gone"
    pools = {
        pool: await stack.enter_async_context(open_pool(pool, settings, connection, hold.worker))
        for pool in settings.pools
    }
    asker = Asker(record.owner, LANE, settings.api.reasoning_field, settings.api.max_prompt_logprobs)
    files = FileStore(settings.files, connection)
    leftovers = Leftovers(connection, records, files.scratch)
    tell = _Progress(hold.batch_id).tell
    watching = cancel_when_revoked(KeyStore(connection), records, record, settings.api.keys_refresh_s)
    stack.callback(asyncio.create_task(watching, name="owner").cancel)
    run = BatchRun(files, records, pools, settings.batches, asker, hold, leftovers, tell)
    try:
        await run.run(wait_s)
    except Fenced:
        log.warning("batch left: it has ended, or another worker has it", batch_id=hold.batch_id)
        return "fenced"
    return "ended"


async def _let_go(records: BatchRecords, hold: Hold) -> None:
    with contextlib.suppress(BatonError):  # the lease runs out by itself
        await records.let_go(hold)


class _Progress:
    """Writes how far a batch is into its job's `meta`, for rq's own tools. Beside the batch: rq's Redis may hang or be away, which holds
    up nothing."""

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id
        self._job = get_current_job()
        self._told: tuple[int, int, int] | None = None
        self._told_s = 0.0
        self._writing: asyncio.Future[None] | None = None

    def tell(self, completed: int, failed: int, total: int) -> None:
        """Once in a while."""
        figures = (completed, failed, total)
        is_busy = self._writing is not None and not self._writing.done()
        if self._job is None or is_busy or figures == self._told or time.monotonic() < self._told_s + TELL_S:
            return
        self._told, self._told_s = figures, time.monotonic()
        meta = {"batch_id": self._batch_id, "completed": completed, "failed": failed, "total": total}
        self._writing = begun_in_thread(_write_meta, self._job, meta)


def _write_meta(job: Job, meta: dict[str, Any]) -> None:
    """Of a job that is still there: else its record would have nothing but this, and no end."""
    job.meta = meta
    try:
        with answering():
            if job.connection.exists(job.key):
                job.save_meta()  # type: ignore[no-untyped-call]
    except RedisUnavailable as error:
        log.debug("rq is not told how far a batch is", batch_id=job.id, error=str(error))
