"""Several prompts in one completion: each is a request of its own, and all their choices are one answer, in the order of the prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec

from api.answers import Opening, asked
from api.collected import Collected
from api.errors import error_of_end
from api.service import ServedPool, Service
from api.several import SeveralAnswer
from pipeline.errors import RequestFailed
from pipeline.stream import RequestStream, Usage


class BatchedAnswer(SeveralAnswer):
    """One JSON body, with the id of the first of them."""

    def __init__(self, service: Service, pool: ServedPool, openings: Sequence[Opening]) -> None:
        super().__init__(service, pool, openings)
        self._collected: dict[int, Collected] = {}

    async def _read(self, number: int, stream: RequestStream) -> None:
        collected = self._collected[number] = Collected(self._pool.preprocessor.tokenizer, asked(stream))
        async with contextlib.aclosing(aiter(stream)) as items:  # type: ignore[type-var]
            async for chunks in items:
                collected.push(chunks)
        if stream.ended is None:
            raise RequestFailed("the stream of tokens ended without an end of the request")
        if stream.ended.state != "done" or not collected.choices.are_complete:
            raise error_of_end(stream.ended)

    async def _body(self) -> bytes:
        shape = self._service.openai
        choices: list[dict[str, Any]] = []
        for number, stream in enumerate(self._streams):
            choices += shape.choices(asked(stream), self._collected[number].all(), len(choices))
        usages = [stream.ended.usage for stream in self._streams if stream.ended is not None]
        usage = Usage(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
        )
        return msgspec.json.encode(shape.of_choices(asked(self._streams[0]), choices, usage))
