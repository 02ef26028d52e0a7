"""Stop strings are decided where tokens are made, so that log, usage and finish reason are the same with and without a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from pipeline.config import PoolSettings
from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, FinishReason, LLMEngineOutput
from workers.holdings import Task

if TYPE_CHECKING:
    from pipeline.backend import Backend


class StopStrings:
    """Text state of the choices that have stop strings. The tokenizer is loaded when the first such request comes."""

    def __init__(self, pool: PoolSettings) -> None:
        self._pool = pool
        self._new_backend: Callable[[BackendInput], Backend] | None = None
        self._loading = asyncio.Lock()
        self._choices: dict[str, list[Backend]] = {}

    async def open(self, task: Task) -> None:
        """Begin a request: the text of its choices stands where their logs do. Raises Unservable where there is no tokenizer."""
        request = task.request.input
        if not request.stop_conditions.stop:
            return
        if not self._pool.has_tokenizer:
            raise Unservable(f"request {request.request_id} has stop strings, its pool no tokenizer")
        async with self._loading:
            if self._new_backend is None:
                self._new_backend = await asyncio.to_thread(_load, self._pool.tokenizer_source)
        backends = [self._new_backend(request) for _ in task.log.tokens]
        for backend, tokens in zip(backends, task.log.tokens, strict=True):
            backend.push(tokens)
        self._choices[request.request_id] = backends

    def cut(self, output: LLMEngineOutput) -> LLMEngineOutput | None:
        """The output up to the token that completes a stop string; None for what comes after it."""
        backends = self._choices.get(output.request_id)
        if backends is None or not output.token_ids:
            return output
        text = backends[output.choice].push(output.token_ids, output.finish_reason)
        if not text.stopped:
            return output
        if not text.accepted:
            return None
        kept = slice(text.accepted)
        return msgspec.structs.replace(
            output,
            token_ids=output.token_ids[kept],
            finish_reason=FinishReason.STOP,
            log_probs=output.log_probs and output.log_probs[kept],
            top_logprobs=output.top_logprobs and output.top_logprobs[kept],
        )

    def cut_all(self, outputs: Sequence[LLMEngineOutput]) -> list[LLMEngineOutput]:
        """`cut` of each, without those that are gone."""
        return [kept for output in outputs if (kept := self.cut(output)) is not None]

    def forget(self, key: str) -> None:
        """The request is over here."""
        self._choices.pop(key, None)


def _load(source: str) -> Callable[[BackendInput], Backend]:
    # imported here: two seconds and 250 MB that a worker without such requests never needs
    from pipeline.backend import Backend
    from pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(source)
    return lambda request: Backend(tokenizer, request)
