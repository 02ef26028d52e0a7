"""The decode stage: fetch the blocks, say so, join the batch, stay until the last choice has ended."""

from __future__ import annotations

import structlog

from pipeline.errors import KVLost, RedisUnavailable, WireError
from pipeline.queue import Verdict
from workers.engine import AsyncEngine
from workers.holdings import Held, Holdings, Task
from workers.outcome import Done, Dropped, Outcome, Retry
from workers.stops import StopStrings
from workers.worker import Worker

log = structlog.get_logger("baton.decode")


def register(worker: Worker, engine: AsyncEngine, holdings: Holdings, stops: StopStrings) -> None:
    """Make `worker` run decode tasks on `engine`. Its outputs come through the step writer."""

    @worker.task("decode", queue="decode")
    async def decode(task: Task) -> Outcome:
        held = holdings.get(task.delivery.key)
        assert held is not None
        if not held.open:  # the worker before this one wrote the last token and died before it said so
            return Done()
        await stops.open(task)
        try:
            cached_tokens, recomputed = await _join(engine, task)
            verdict = await _say_joined(worker, task, cached_tokens, recomputed)
            if verdict is not Verdict.ACCEPTED:
                return Dropped(verdict.name.lower())
            if task.delivery.is_suspect:
                return await _prove(held)
            await held.complete
            return Done()
        finally:
            stops.forget(task.delivery.key)


async def _prove(held: Held) -> Outcome:
    """Its last delivery ended in a dead engine, so it runs alone. A token later the engine lives: others may be tried, and it joins
    them from its log instead of keeping them waiting until its end."""
    await held.progress.wait()
    if held.complete.done():
        held.complete.result()  # raises what made the engine give up on it
        return Done()
    return Retry("ran alone without harm, joins the others", counts=False)


async def _say_joined(worker: Worker, task: Task, cached_tokens: int, recomputed: str) -> Verdict:
    """While Redis is away the blocks are kept: who owns the request is asked when it is back."""
    while True:
        try:
            return await worker.queue.fetched(
                task.delivery, worker.name, recomputed=recomputed, cached_tokens=None if task.handle else cached_tokens
            )
        except RedisUnavailable as error:
            log.warning("fetch not said, trying again", request_id=task.delivery.id, error=str(error))


async def _join(engine: AsyncEngine, task: Task) -> tuple[int, str]:
    """Join the batch; returns cached prompt tokens and, where blocks had to be computed again, why."""
    request, handle = task.request.input, task.handle
    if handle is not None:
        try:
            return await engine.decode(request, handle, task.log), ""
        except (KVLost, WireError) as lost:  # not an error of the request: its prompt and log are at hand
            reason = lost.reason if isinstance(lost, KVLost) else "handle"
            log.warning("blocks lost, computed again", request_id=task.delivery.id, reason=reason, error=str(lost))
            return await engine.decode(request, None, task.log), reason
    resumed = any(task.log.tokens)
    return await engine.decode(request, None, task.log), "resumed" if resumed else ""
