"""Writes engine steps to the log and the bus: one script call in flight; steps that queue up behind it leave merged in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
import structlog

from pipeline.errors import EngineError, RedisUnavailable
from pipeline.protocol import LLMEngineOutput
from pipeline.queue import PoolQueue, StepItem, Verdict
from workers.holdings import Held, Holdings, is_logged

log = structlog.get_logger("baton.steps")

T = TypeVar("T")


class StepWriter:
    """Owns what is computed and not yet written. `put` never waits; `run` writes until cancelled."""

    def __init__(
        self, queue: PoolQueue, worker: str, holdings: Holdings, *, stop: Callable[[Held, str], Awaitable[None]]
    ) -> None:
        self._queue = queue
        self._worker = worker
        self._holdings = holdings
        self._stop = stop  # called for a delivery that is not ours any more
        self._pending: list[LLMEngineOutput] = []
        self._work = asyncio.Event()

    def put(self, outputs: Sequence[LLMEngineOutput]) -> None:
        """Take the outputs of one step."""
        self._pending.extend(outputs)
        self._work.set()

    async def run(self) -> None:
        """Write what was put, in order, until cancelled. While Redis is away it waits with what it has."""
        while True:
            await self._work.wait()
            self._work.clear()
            outputs, self._pending = self._pending, []
            rows = [(held, output) for output in merged(outputs) if (held := self._holdings.get(output.request_id))]
            logged = [(held, output) for held, output in rows if is_logged(output)]
            if logged:
                verdicts = await self._write(
                    [StepItem(held.id, held.api, held.epoch, output) for held, output in logged]
                )
                for (held, output), verdict in zip(logged, verdicts, strict=True):
                    await self._settle(held, output, verdict)
            for held, output in rows:
                if not is_logged(output):
                    held.fail(EngineError(output.error or "the engine gave up on this request"))

    async def _write(self, items: list[StepItem]) -> list[Verdict]:
        while True:
            try:
                return await self._queue.step(self._worker, items)
            except (
                RedisUnavailable
            ) as error:  # a step may be repeated; what ran out meanwhile is fenced when it is back
                log.warning("step not written, trying again", items=len(items), error=str(error))

    async def _settle(self, held: Held, output: LLMEngineOutput, verdict: Verdict) -> None:
        match verdict:
            case Verdict.ACCEPTED:
                held.advance(output)
            case Verdict.FENCED | Verdict.ENDED:
                await self._stop(held, "fenced" if verdict is Verdict.FENCED else "ended elsewhere")
            case Verdict.GAP:
                held.fail(
                    EngineError(
                        f"{held.id}: the log in Redis is shorter than this worker's; it is computed again from it"
                    )
                )


def merged(outputs: Sequence[LLMEngineOutput]) -> list[LLMEngineOutput]:
    """Outputs of several steps with those that follow one another in a choice joined, in order of first appearance."""
    joined: dict[tuple[str, int], LLMEngineOutput] = {}
    rest: list[LLMEngineOutput] = []
    for output in outputs:
        key = (output.request_id, output.choice)
        before = joined.get(key)
        if before is None:
            joined[key] = output
        elif (
            before.index + len(before.token_ids) == output.index and before.finish_reason is None and is_logged(output)
        ):
            joined[key] = msgspec.structs.replace(
                output,
                index=before.index,
                token_ids=before.token_ids + output.token_ids,
                log_probs=_joined(before.log_probs, output.log_probs),
                top_logprobs=_joined(before.top_logprobs, output.top_logprobs),
                prompt_logprobs=before.prompt_logprobs or output.prompt_logprobs,
            )
        else:
            rest.append(output)
    return [*joined.values(), *rest]


def _joined(before: list[T] | None, after: list[T] | None) -> list[T] | None:
    """A last output may have a finish reason and no token, so nothing here either."""
    return before if after is None else after if before is None else before + after
