"""One line of a batch: sent, waited for and answered, as an API process would, but with nobody who reads along.

Each of its requests has an idempotency key of its own, so that a worker that takes up a batch finds what its predecessor sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import structlog

from pipeline.batches.lines import Line, model_of
from pipeline.errors import BatonError, DeadlineExceeded, RedisUnavailable, Refused, RequestCancelled
from pipeline.labels import with_label
from pipeline.pools import ServedPool, pool_of
from pipeline.protocol import Request
from pipeline.stream import TokenChunk, ended_of, total
from pipeline.surface.endpoints import ENDPOINTS, Answered, Asker, Endpoint
from pipeline.surface.errors import error_json, row_of

LANE = "low"
AT_ONCE, ENDED_AT_ONCE = 1000, 32  # keys that are looked at together, requests that are ended
AGAIN_S, LONGEST_AGAIN_S = 1.0, 30.0  # before what was refused, or met no Redis, is sent again

log = structlog.get_logger("baton.batches")


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A request under way."""

    pool: ServedPool
    id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What became of a line. `body`: of the answer, or of its error; `sent`: what Redis still knows of it."""

    line: Line
    status: int
    body: bytes
    sent: Sequence[Sent] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_success(self) -> bool:
        """Whether the line belongs to the output, and not to the errors."""
        return self.status < 300


class Sender:
    """Sends the lines of one batch. `deadline_s`: of all of it, since 1970."""

    def __init__(
        self, pools: Mapping[str, ServedPool], asker: Asker, batch_id: str, deadline_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._pools = pools
        self._asker = asker
        self._batch_id = batch_id
        self._deadline_s = deadline_s
        self._clock = clock
        self._under_way: set[Sent] = set()
        self._why_stopped = ""

    def __len__(self) -> int:
        return len(self._under_way)

    async def answer(self, line: Line) -> Result:
        """Send a line and return its answer, whatever that is."""
        sent: list[Sent] = []
        try:
            endpoint = ENDPOINTS[line.url]
            body, pool = endpoint.read(line.body), pool_of(self._pools, model_of(line.body))
            requests = await asyncio.to_thread(endpoint.requests, pool, body, self._asker)
            answered = await _all(
                self._one(pool, endpoint, self._key(line.number, number), request, sent)
                for number, request in enumerate(requests)
            )
            told = await asyncio.to_thread(endpoint.answer, pool, body, self._asker, answered)
        except BatonError as error:
            return _failed(line, error, sent)
        except Exception:  # a mistake of ours: it would be met again by whoever takes the batch up, and end no batch
            log.exception("a line failed inside the worker", batch_id=self._batch_id, line=line.number + 1)
            return _failed(line, BatonError("internal error; the log of the batch worker has the reason"), sent)
        usage = total(one.ended.usage for one in answered)
        return Result(line, 200, told, sent, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    async def stop(self, why: str) -> None:
        """End all requests that are under way; the lines that lack them get errors."""
        self._why_stopped = why
        for sent in list(self._under_way):
            await sent.pool.client.queue.cancel(sent.id, why)

    async def stop_left(self, lines: Sequence[int], why: str) -> None:
        """End what somebody sent of these lines and nobody waits for. Raises RedisUnavailable."""
        for pool in self._pools.values():
            number, left = 0, list(lines)
            while left:  # those that have a request of this number, and may have one of the next
                found = await self._sent(pool, left, number)
                ids = list(found.values())
                for start in range(0, len(ids), ENDED_AT_ONCE):
                    some = ids[start : start + ENDED_AT_ONCE]
                    await asyncio.gather(*(pool.client.queue.cancel(one, why) for one in some))
                number, left = number + 1, list(found)

    async def _sent(self, pool: ServedPool, lines: Sequence[int], number: int) -> dict[int, str]:
        """Of these lines those that have a request of this number in a pool, and its id."""
        found: dict[int, str] = {}
        for start in range(0, len(lines), AT_ONCE):
            some = lines[start : start + AT_ONCE]
            ids = await pool.client.queue.first_of_keys([self._key(line, number) for line in some])
            found |= {line: one for line, one in zip(some, ids, strict=True) if one is not None}
        return found

    def _key(self, line: int, number: int) -> str:
        """What one request of a line is known by, whoever sends it."""
        return f"batch:{self._batch_id}:{line}:{number}"

    async def _one(
        self, pool: ServedPool, endpoint: Endpoint[Any], key: str, request: Request, sent: list[Sent]
    ) -> Answered:
        labelled = with_label(request, key.removeprefix("batch:"))
        while True:
            one = Sent(pool, await self._admitted(pool, endpoint.stage, key, labelled))
            self._under_way.add(one)
            try:
                answered = await self._ended(one, endpoint.stage)
            finally:
                self._under_way.discard(one)
            if answered is not None:
                sent.append(one)
                return answered
            log.warning("Redis lost a request of a batch, sending it again", batch_id=self._batch_id, request_id=one.id)
            await asyncio.sleep(AGAIN_S)

    async def _admitted(self, pool: ServedPool, stage: str, key: str, request: Request) -> str:
        """Raises what will never be otherwise."""
        while True:
            left_s = self._deadline_s - self._clock()
            if self._why_stopped:
                raise RequestCancelled(self._why_stopped)
            if left_s <= 0:
                raise DeadlineExceeded("the time of the batch ran out before it was sent", stage=stage)
            try:
                return await pool.client.admit(
                    request, stage=stage, priority=LANE, deadline_s=left_s, idempotency_key=key,
                    insists=True,
                )  # fmt: skip
            except Refused as refusal:
                await asyncio.sleep(min(refusal.retry_after_s, LONGEST_AGAIN_S))
            except RedisUnavailable:
                await asyncio.sleep(AGAIN_S)

    async def _ended(self, one: Sent, stage: str) -> Answered | None:
        """What became of a request; None where Redis does not know it any more."""
        client = one.pool.client
        while True:
            try:
                await client.ends.wait(one.id)
                found = await client.find(one.id)
                if found is None or found.request is None or not found.has_ended:
                    return None
                if stage:
                    (brief,) = await client.queue.standing([one.id], with_results=True)
                    return Answered(found.request, [], ended_of(found), brief.result) if brief is not None else None
                chunks: list[TokenChunk] = []
                async with await client.attach(one.id, found=found) as stream:
                    async for some in stream:
                        chunks += some
                return Answered(found.request, chunks, stream.ended or ended_of(found))
            except RedisUnavailable as error:
                log.warning("Redis is away, the batch waits", batch_id=self._batch_id, error=str(error))
                await asyncio.sleep(AGAIN_S)


def _failed(line: Line, error: BatonError, sent: Sequence[Sent]) -> Result:
    """What HTTP would answer."""
    return Result(line, row_of(error).status, error_json(error), sent)


async def _all(works: Iterable[Coroutine[Any, Any, Answered]]) -> list[Answered]:
    """All results. Where one raises, nothing of the others goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
