"""A Python client of queues, the Celery way: call tasks of one's own, or generate; wait for results, revoke, read tokens.

    async with connect(settings, "baton-tiny") as client:
        embed = client.task("embed", queue="embed")
        result = await embed.delay("some text", scale=2.0)
        vector = await result.get(timeout=10)

A request is stored when `delay` returns, and goes on whatever becomes of this process: `client.result(id)` finds it again from any
other. Nothing is streamed unless it is read, so thousands may be in flight: each costs its id here, and one call when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from pipeline.client import PoolClient
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    RequestNotFound,
)
from pipeline.ids import bare_id, new_process_name, new_request_id
from pipeline.keys import wrong_queue
from pipeline.logs import configure_in_others_program
from pipeline.protocol import BackendInput, FinishReason, Request, TaskCall, no_input
from pipeline.queue import LANES, Brief
from pipeline.redis_server import running_redis
from pipeline.stream import Ended, Usage

PENDING, STARTED, RETRY, SUCCESS, FAILURE, REVOKED = "PENDING", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED"

# Celery's name of each state; a queued request that waits for its next try is RETRY
STATES = {
    "queued": PENDING, "running": STARTED, "done": SUCCESS, "failed": FAILURE, "dead": FAILURE, "expired": FAILURE,
    "cancelled": REVOKED,
}  # fmt: skip


class Generation(msgspec.Struct, frozen=True):
    """What a generation gave: the tokens of each choice, and why it ended."""

    token_ids: list[list[int]]
    finish_reasons: list[FinishReason | None]
    usage: Usage


@contextlib.asynccontextmanager
async def connect(settings: Settings, pool: str = "") -> AsyncIterator[TaskClient]:
    """A client of one pool (left out: the only one) with a connection of its own.

    Without a `redis.url` it finds the private Redis of a `baton up` in this folder, as the command line does. Raises `ConfigError`,
    `RedisUnavailable`. What Baton logs goes to the standard `logging` under `baton`.
    """
    configure_in_others_program()
    if not pool and len(settings.pools) == 1:
        pool = next(iter(settings.pools))
    if pool not in settings.pools:
        raise ConfigError(f"which pool? {pool!r} is none of {sorted(settings.pools)}")
    connection = Connection(running_redis(settings.redis))
    try:
        async with PoolClient(
            connection, pool, new_process_name("client"), queue=settings.queue,
            router=settings.router, worker=settings.worker, silence_s=settings.api.silence_s,
        ) as client:  # fmt: skip
            yield TaskClient(client)
    finally:
        await connection.close()


class TaskClient:
    """See the module's docstring. Stands on a `PoolClient`, whose owner opens and closes it."""

    def __init__(self, client: PoolClient) -> None:
        self.pool = client

    def task(self, name: str, *, queue: str) -> TaskCaller:
        """What calls the task `name` of the stage that reads `queue`. Raises `InvalidRequest` where no such queue can be."""
        if wrong := wrong_queue(queue):
            raise InvalidRequest(wrong, param="queue")
        return TaskCaller(self, name, queue)

    def result(self, request_id: str) -> AsyncResult:
        """The result of a request of this pool, whoever submitted it."""
        return AsyncResult(self.pool, bare_id(request_id, [self.pool.pool]))

    async def call(
        self, call: TaskCall, *, queue: str, priority: str = "default", countdown: float = 0.0, expires: float | None = None,
        idempotency_key: str = "",
    ) -> AsyncResult:  # fmt: skip
        """Queue one call of a task. Raises `InvalidRequest`, `QueueFull`, `RedisUnavailable`."""
        if wrong := wrong_queue(queue):
            raise InvalidRequest(wrong, param="queue")
        try:
            msgspec.msgpack.encode(call)
        except (TypeError, OverflowError, RecursionError) as error:
            raise InvalidRequest(f"arguments of {call.name} cannot be sent: {error}", param="args") from error
        request_id = new_request_id(self.pool.pool)
        made = Request(
            id=request_id,
            kind="task",
            created_s=int(time.time()),
            input=no_input(request_id, self.pool.pool),
            task=call,
        )
        return await self._submit(made, queue, priority, countdown, expires, idempotency_key)

    async def generate(
        self, request: BackendInput | Request, *, priority: str = "default", countdown: float = 0.0,
        expires: float | None = None, idempotency_key: str = "",
    ) -> AsyncResult:  # fmt: skip
        """Queue one generation; its result is a `Generation`. A `BackendInput` gets an id of its own.

        Raises `InvalidRequest`, `QueueFull`, `RedisUnavailable`.
        """
        if isinstance(request, BackendInput):
            request_id = new_request_id(self.pool.pool)
            engines_view = msgspec.structs.replace(request, request_id=request_id)
            request = Request(id=request_id, kind="text_completion", created_s=int(time.time()), input=engines_view)
        if not request.input.token_ids:
            raise InvalidRequest("a generation needs at least one prompt token", param="token_ids")
        if request.input.stop_conditions.max_tokens is None:
            raise InvalidRequest("a generation needs a limit", param="stop_conditions.max_tokens")
        return await self._submit(request, "", priority, countdown, expires, idempotency_key)

    async def _submit(
        self, request: Request, stage: str, priority: str, countdown: float, expires: float | None, idempotency_key: str
    ) -> AsyncResult:
        if priority not in LANES:
            raise InvalidRequest(f"priority {priority!r} is none of {', '.join(LANES)}", param="priority")
        if countdown < 0:
            raise InvalidRequest(f"countdown is {countdown:g} s: it cannot be negative", param="countdown")
        if expires is not None and expires <= 0:
            raise InvalidRequest(f"expires is {expires:g} s: it must be above 0", param="expires")
        if expires is not None and expires <= countdown:
            raise InvalidRequest(
                f"it expires after {expires:g} s, before its countdown of {countdown:g} s", param="expires"
            )
        key, body_digest = _idempotency(request, stage, idempotency_key)
        request_id = await self.pool.admit(
            request,
            stage=stage,
            priority=priority,
            deadline_s=None if expires is None else expires - countdown,
            delay_s=countdown,
            idempotency_key=key,
            body_digest=body_digest,
        )
        return AsyncResult(self.pool, request_id)


def _idempotency(request: Request, stage: str, key: str) -> tuple[str, str]:
    """The key as the queue knows it, and the digest of what it stands for; empty where there is none. It stands for one call of one task
    (or one generation); with other arguments it is a conflict."""
    if not key:
        return "", ""
    name = request.task.name if request.task else request.kind
    asked = msgspec.structs.replace(request.input, request_id="")
    body = msgspec.msgpack.encode((request.task, asked))
    named = hashlib.blake2b("\0".join((stage, name, key)).encode(), digest_size=16).hexdigest()
    return named, hashlib.blake2b(body, digest_size=16).hexdigest()


class TaskCaller:
    """A task of one's own, as its callers know it: a name and the queue that its workers read."""

    def __init__(self, client: TaskClient, name: str, queue: str) -> None:
        self._client = client
        self.name, self.queue = name, queue

    async def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Call it as it stands. Raises as `apply_async`."""
        return await self.apply_async(args, kwargs)

    async def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, queue: str | None = None,
        priority: str = "default", countdown: float = 0.0, expires: float | None = None, idempotency_key: str = "",
    ) -> AsyncResult:  # fmt: skip
        """Call it with options. `countdown`: seconds before which nobody takes it; `expires`: seconds by which it must be done (left
        out: the lane's deadline); `priority`: high, default or low. A second call with an `idempotency_key` gives the first one's result.

        Raises `InvalidRequest` (arguments that msgpack does not carry, a queue or priority that cannot be), `QueueFull` with
        `retry_after_s`, `RedisUnavailable`, and `TypeError` for a text as `args`.
        """
        if isinstance(args, (str, bytes)):  # a sequence, too: each character would be an argument
            raise TypeError(f"args is a list or tuple of arguments, not {args!r:.100}: write ({args!r:.100},)")
        call = TaskCall(name=self.name, args=list(args), kwargs=dict(kwargs or {}))
        return await self._client.call(
            call, queue=queue or self.queue, priority=priority, countdown=countdown, expires=expires,
            idempotency_key=idempotency_key,
        )  # fmt: skip


class AsyncResult:
    """What becomes of one request. Costs nothing but its id until it is asked; may be made anew from the id by any process.

    Every method raises `RequestNotFound` when the id is unknown (its record is kept for `queue.result_ttl_s`), and
    `RedisUnavailable`.
    """

    def __init__(self, client: PoolClient, request_id: str) -> None:
        self.id = request_id
        self._client = client

    async def state(self) -> str:
        """PENDING, STARTED, RETRY, SUCCESS, FAILURE or REVOKED."""
        brief = await self._brief()
        return RETRY if brief.is_retry else STATES[brief.state]

    async def ready(self) -> bool:
        """Whether it has ended."""
        return (await self._brief()).has_ended

    async def get(self, timeout: float | None = None) -> Any:
        """Wait for its end and return what it gave: a task's result, or a `Generation`.

        Raises `RequestFailed`, `RequestCancelled` or `DeadlineExceeded` when it ended otherwise, `TimeoutError` when it has not ended
        within `timeout` seconds; it then goes on.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._client.ends.wait(self.id)
        except TimeoutError:
            raise TimeoutError(f"{self.id} has not ended within {timeout:g} s; it goes on") from None
        brief = await self._brief(with_results=True)
        raise_unless_done(self.id, brief)
        if brief.result:
            return msgspec.msgpack.decode(brief.result)
        return await self._generation() if brief.stage in ("prefill", "decode") else None

    async def revoke(self, reason: str = "revoked") -> None:
        """End it, whoever holds it. One that has ended already stays as it is."""
        state, _ = await self._client.queue.cancel(self.id, reason)
        if state == "gone":
            raise self._not_found()

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """The tokens of its first choice from the first one on, as they come; raises as `get` when it ends otherwise than done."""
        choices = (await self._brief()).choices
        async with await self._client.attach(self.id, choices) as stream:
            async for chunks in stream:
                for chunk in chunks:
                    if chunk.choice == 0 and chunk.token_ids:
                        yield chunk.token_ids
        assert stream.ended is not None
        raise_unless_done(self.id, stream.ended)

    async def _brief(self, *, with_results: bool = False) -> Brief:
        (brief,) = await self._client.queue.standing([self.id], with_results=with_results)
        if brief is None:
            raise self._not_found()
        return brief

    async def _generation(self) -> Generation:
        standing = await self._client.queue.attach(self.id, watch=False)
        if standing is None:
            raise self._not_found()
        usage = Usage(standing.prompt_tokens, standing.completion_tokens, standing.cached_tokens)
        return Generation(standing.log.tokens, standing.log.finished, usage)

    def _not_found(self) -> RequestNotFound:
        return RequestNotFound(self.id)


def raise_unless_done(request_id: str, ended: Brief | Ended) -> None:
    """The error of a request that did not end as done, with its id and reason."""
    said = f"{request_id}: {ended.reason}"
    match ended.state:
        case "done":
            return
        case "expired":
            raise DeadlineExceeded(said, stage=ended.stage)
        case "cancelled":
            raise RequestCancelled(said)
        case _:
            raise RequestFailed(said)
