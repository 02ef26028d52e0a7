"""rq's jobs: one a batch, and nothing else is ever run.

rq takes a function's name from Redis and imports it, so whoever can write to Redis could run anything. Here a job is refused unless it is
one of ours with arguments of ours; callbacks and webhooks that it names are not looked at. Jobs are JSON: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from rq import Queue, Retry, Worker
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from pipeline.batches.record import IDS
from pipeline.blocking import answering, blocking_client, is_cluster
from pipeline.config import RedisSettings, RqSettings
from pipeline.errors import ConfigError, RedisUnavailable
from pipeline.waiting import in_thread

RUN_BATCH = "workers.batch.job.run_batch"
ALLOWED = (RUN_BATCH,)
RETRIES = 100  # of a job whose horse died; the batch itself says when it is over
KEPT_S = 86_400  # a job that has ended
SOON_S = 2.0  # who makes a batch waits for rq no longer

WAITING = (JobStatus.QUEUED, JobStatus.DEFERRED, JobStatus.SCHEDULED)

log = structlog.get_logger("baton.batches")


class NotAllowedJob(Exception):
    """A job that is none of Baton's."""


class BatchJob(Job):
    """See the module's docstring."""

    success_callback = None
    failure_callback = None
    stopped_callback = None

    @property
    def func(self) -> Callable[..., Any]:
        """What it runs. Raises NotAllowedJob for what is not ours."""
        given = self.kwargs.get("batch_id")
        is_ours = (
            self.func_name in ALLOWED and not self.instance and not self.args and list(self.kwargs) == ["batch_id"]
            and isinstance(given, str) and IDS.has(given)
        )  # fmt: skip
        if not is_ours:
            raise NotAllowedJob(f"job {self.id}: {str(self.func_name)[:100]!r} is none of Baton's jobs: it was not run")
        found: Callable[..., Any] = super().func
        return found

    def restore(self, raw_data: Any) -> None:
        """What is known of a job. A record that rq cannot read is that of no job: it would end the worker that takes it."""
        try:
            super().restore(raw_data)
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            log.warning("a job is not readable, it is passed over", job_id=self.id, error=repr(error)[:200])
            raise NoSuchJobError(self.id) from error

    def send_webhooks(self, status: object, *, exc_string: str | None = None) -> None:
        """Nobody is told by rq."""


class BatchQueue:
    """The queue of batches. Its methods block; `enqueue_soon` does not. Raises ConfigError for a Redis that rq cannot use."""

    def __init__(self, redis: RedisSettings, rq: RqSettings) -> None:
        settings = msgspec.structs.replace(redis, url=rq.url) if rq.url else redis
        self.connection = blocking_client(settings)
        self.queue = Queue(rq.queue, connection=self.connection, serializer=JSONSerializer, job_class=BatchJob)

    def check(self) -> None:
        """Raises ConfigError where rq's keys would lie on several nodes, RedisUnavailable."""
        if is_cluster(self.connection):
            raise ConfigError(
                "rq.url: this is a Redis Cluster, and rq's keys share no hash tag, so their scripts cannot run there: "
                "name a single server in rq.url (BATON_RQ_URL); everything else may stay in the cluster"
            )

    def enqueue(self, batch_id: str) -> None:
        """One job for a batch; one that is there and waits is left alone. Raises RedisUnavailable."""
        with answering():
            with contextlib.suppress(NoSuchJobError):
                found = BatchJob.fetch(batch_id, connection=self.connection, serializer=JSONSerializer)
                if found.get_status() in WAITING and self.queue.get_job_position(batch_id) is not None:
                    return  # else a worker died that had just taken it out
                found.delete()
            self.queue.enqueue_call(
                RUN_BATCH, kwargs={"batch_id": batch_id}, job_id=batch_id, timeout=-1, result_ttl=KEPT_S, failure_ttl=KEPT_S,
                retry=Retry(max=RETRIES), description=batch_id,
            )  # fmt: skip

    def workers(self) -> set[str]:
        """Names of the batch workers that rq lists; one that died stays there for a while. Raises RedisUnavailable."""
        with answering():
            listed = [
                key.removeprefix(Worker.redis_worker_namespace_prefix) for key in Worker.all_keys(queue=self.queue)
            ]
        return {name.rpartition("-")[0] for name in listed}

    @staticmethod
    def name_at_rq(worker: str) -> str:
        """A name of its own for each start of a worker: rq lists one that was killed for a while, and refuses another one of its name."""
        return f"{worker}-{secrets.token_hex(3)}"

    async def enqueue_soon(self, batch_id: str) -> None:
        """The same, for a moment. A queue that does not answer is no loss: workers look for batches that nobody has."""
        try:
            await in_thread(SOON_S, self.enqueue, batch_id)
        except (RedisUnavailable, TimeoutError) as error:
            log.warning("batch not enqueued", batch_id=batch_id, error=str(error), then="a batch worker finds it")

    def close(self) -> None:
        """Leave Redis."""
        self.connection.close()
