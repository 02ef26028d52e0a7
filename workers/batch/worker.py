"""`baton worker batch`: an rq worker that runs batches and nothing else, one at a time, each in a process forked for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import structlog
from rq import Queue, Worker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from pipeline.batches.jobs import BatchJob, BatchQueue
from pipeline.batches.records import BatchRecords
from pipeline.blocking import answering
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, RedisUnavailable, StorageUnavailable
from pipeline.files.store import FileStore
from pipeline.processes import die_with_parent
from workers.batch import job
from workers.batch.job import HandedBack
from workers.batch.tidy import Leftovers
from workers.batch.webhooks import TellerProcess
from workers.beat import Beat

LOOK_S = 5  # between two looks for batches that nobody has
ANSWER_S = 5  # that a Redis may take to answer
MONITOR_S = 5  # between two beats of a job's heart

log = structlog.get_logger("baton.batches")


def serve(settings: Settings, name: str) -> None:
    """Run batches until a signal asks to leave: what runs then is handed back. Raises ConfigError, RedisUnavailable."""
    beat = Beat(settings.worker.beat_dir)
    batches = BatchQueue(settings.redis, settings.rq)
    teller = TellerProcess(settings)
    teller.keep_running()  # forked before there are threads
    asyncio.run(_begin(settings, batches, beat))
    job.configure(settings, name)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    worker = BatchWorker(
        [batches.queue], name=batches.name_at_rq(name), connection=batches.connection, job_class=BatchJob, serializer=JSONSerializer,
        maintenance_interval=LOOK_S, worker_ttl=15 + LOOK_S, job_monitoring_interval=MONITOR_S,
    )  # fmt: skip
    worker.settings, worker.batches, worker.teller, worker.beat = settings, batches, teller, beat
    log.info("batch worker ready", worker=name, queue=settings.rq.queue)
    worker.work(logging_level="WARNING")
    beat.end()
    teller.stop()
    batches.close()
    if not worker.is_leaving:
        raise WorkerLost(f"{name} ended, though nobody asked it to: its log says why; start it again")
    log.info("left", worker=name)


class WorkerLost(BatonError):
    """rq's loop ended by itself."""

    code = "worker_lost"


class BatchWorker(Worker):
    """See the module's docstring."""

    settings: Settings
    batches: BatchQueue
    teller: TellerProcess
    beat: Beat
    is_leaving = False
    pools_answer = True  # whether Baton's own Redis did, when it was looked for batches last
    max_connection_wait_time = 10.0  # rq does not beat while it waits for its Redis: probes must see it live
    swept_s = 0.0  # when everything was looked at that batches may have left

    @property
    def connection_timeout(self) -> int:
        """Seconds that a command may take: those that rq waits for a job, and some."""
        return int(self.dequeue_timeout) + ANSWER_S

    def run_maintenance_tasks(self) -> None:
        """rq's own, the process that tells of ends, and batches whose worker died."""
        self.teller.keep_running()
        try:
            with answering():
                super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
            asyncio.run(_look(self.settings, self.batches, is_thorough=self._sweeps_now()))
            self.pools_answer = True
        except BatonError as error:
            log.warning("cannot look for batches", worker=self.name, error=str(error), then=f"again in {LOOK_S} s")
            self.pools_answer = False
            self.beat.show(is_ready=False)
        if self.is_leaving:  # what rq's handler raised, an event loop swallowed
            raise StopRequested

    def _sweeps_now(self) -> bool:
        """Each `files.sweep_s`, and when it has begun."""
        now_s = time.monotonic()
        is_due = not self.swept_s or now_s > self.swept_s + self.settings.files.sweep_s
        self.swept_s = now_s if is_due else self.swept_s
        return is_due

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """While a job runs."""
        self.teller.keep_running()
        with self._going_on():
            super().maintain_heartbeats(job, execution)

    # What rq says to its Redis within its loop, which would end where that is away. Where it waits for jobs it comes again by itself.

    def execute_job(self, job: Job, queue: Queue) -> None:
        """A job, to its end. Its process has a line of its own to Baton's Redis."""
        with self._going_on():
            super().execute_job(job, queue)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """It lives: rq is told, each `MONITOR_S` or `LOOK_S`, and who probes it."""
        with self._going_on():
            super().heartbeat(timeout, pipeline)
            self.beat.show(is_ready=self.pools_answer and not self.is_leaving)

    def set_state(self, state: str, pipeline: Any = None) -> None:
        """It waits, or works."""
        with self._going_on():
            super().set_state(state, pipeline)

    def check_for_suspension(self, burst: bool) -> None:
        """Whether somebody stopped all workers (`rq suspend`)."""
        with self._going_on():
            super().check_for_suspension(burst)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            with answering():
                yield
        except RedisUnavailable as error:
            log.warning("rq's Redis is away, going on", worker=self.name, error=str(error))
            self.beat.show(is_ready=False)

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        """The forked process never outlives this one, not even its `kill -9`."""
        die_with_parent(os.getppid())
        super().main_work_horse(job, queue)

    def handle_warm_shutdown_request(self) -> None:
        """Batches take hours, so one that runs is handed back."""
        self.is_leaving = True
        if self.horse_pid:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.horse_pid, signal.SIGTERM)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """One line, whose reason is in rq's record of the job, too."""
        if isinstance(exc_info[1], HandedBack):
            return  # it was told, and is no fault
        log.warning("job failed", worker=self.name, batch_id=job.id, error=str(exc_info[1])[:500])


async def _begin(settings: Settings, batches: BatchQueue, beat: Beat) -> None:
    """Wait for Redis and rq's own, and see that there can be a store of files. Raises ConfigError, RedisUnavailable."""
    connection = Connection(settings.redis)
    of_rq = Connection(msgspec.structs.replace(settings.redis, url=settings.rq.url or settings.redis.url))
    try:
        FileStore(settings.files, connection)
        async with beat.kept(lambda: False):
            await connection.reach()
            await of_rq.reach()
    finally:
        await connection.close()
        await of_rq.close()
    batches.check()
    await _look(settings, batches)


async def _look(settings: Settings, batches: BatchQueue, *, is_thorough: bool = False) -> None:
    """Enqueue batches that have not ended and that nobody has; remove what those left that have ended. Raises RedisUnavailable."""
    connection = Connection(settings.redis)
    try:
        records = BatchRecords.of(connection, settings.batches)
        for batch_id in await records.unheld():
            await asyncio.to_thread(batches.enqueue, batch_id)
        if is_thorough or await records.untidy():
            scratch = FileStore(settings.files, connection).scratch
            await Leftovers(connection, records, scratch).remove_all(is_thorough=is_thorough)
    except StorageUnavailable as error:
        log.warning("what batches left stays for now", error=str(error))
    finally:
        await connection.close()
