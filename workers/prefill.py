"""The prefill stage: compute the prompt, publish the blocks, hand over."""

from __future__ import annotations

from workers.engine import AsyncEngine
from workers.holdings import Task
from workers.outcome import Handover, Outcome
from workers.stops import StopStrings
from workers.worker import Worker


def register(worker: Worker, engine: AsyncEngine, stops: StopStrings) -> None:
    """Make `worker` run prefill tasks on `engine`."""

    @worker.task("prefill", queue="prefill")
    async def prefill(task: Task) -> Outcome:
        await stops.open(task)  # before there are blocks that an interruption here would leave behind
        try:
            prefilled = await engine.prefill(task.request.input, task.log)
            return Handover(stops.cut_all(prefilled.outputs), prefilled.kv, prefilled.cached_tokens)
        finally:
            stops.forget(task.delivery.key)
