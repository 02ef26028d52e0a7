"""What the vLLM engine holds of a request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import EngineError
from pipeline.protocol import BackendInput, LLMEngineOutput


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of a request, while vLLM has it. `output` is all of its log."""

    job: Job
    number: int
    key: str  # vLLM's id
    output: list[int]
    first: asyncio.Future[int]  # set with its first output: the prompt tokens that were not computed
    why: str = ""  # why vLLM will give up on it, where that is known

    def note(self, error: Exception) -> None:
        """vLLM will give up on it. Called on any thread."""
        self.why = str(error)


@dataclass(slots=True, eq=False)
class Job:
    """A request: its choices that have not ended, and who waits for it."""

    request: BackendInput
    is_joining: bool = True  # `prefill` or `decode` has not returned yet: what comes out is kept in `outputs`
    choices: dict[int, Choice] = field(default_factory=dict)
    outputs: list[LLMEngineOutput] = field(default_factory=list)
    _futures: list[asyncio.Future[Any]] = field(default_factory=list)

    def future(self) -> asyncio.Future[Any]:
        """A future that ends with the job, whatever happens."""
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        return future

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for future in self._futures:
            future.cancel()

    def fail(self, error: EngineError) -> None:
        """It will not come to what is waited for."""
        for future in self._futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be there to hear it
