"""One request that vLLM does not take fails alone: the thread that steps vLLM goes on, and nothing of that request stays in vLLM."""

from __future__ import annotations

import asyncio
import types
from collections import deque
from typing import Any

import pytest

from workers.engines.vllm.core import Core


class Engine:
    """Shaped as vLLM's `LLMEngine` in one process: each request that it is given gets one output in the next step."""

    def __init__(self, bad_at: str) -> None:
        self.engine_core = self  # the client, and behind it the core
        self.scheduler = self
        self.batch_queue: deque[Any] = deque()
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.aborted: list[str] = []
        self._bad_at = bad_at

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        self._may_fail(request, "before the scheduler")
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        self.requests[request.request_id] = request
        self._may_fail(request, "in the scheduler")

    def _may_fail(self, request: Any, where: str) -> None:
        if request.request_id == "bad" and where == self._bad_at:
            raise RuntimeError(where)

    def abort_requests(self, keys: list[str]) -> None:
        for key in keys:
            if self.requests.pop(key, None) is not None:
                self.aborted.append(key)

    def has_requests(self) -> bool:
        return bool(self.requests)

    def get_output(self) -> Any:
        outputs, self.requests = list(self.requests), {}
        return types.SimpleNamespace(outputs=outputs, scheduler_stats=None)

    def shutdown(self) -> None: ...


class Heard:
    """What a core says."""

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.deaths: list[BaseException] = []
        self.took_s: list[float] = []
        self._news: asyncio.Queue[None] = asyncio.Queue()

    def core(self) -> Core:
        """A core that says it here."""
        return Core(self._step, self._death, self._refusal, lambda: 0, lambda: 0.002)

    def _step(self, step: Any, took_s: float) -> None:
        self.took_s.append(took_s)
        for output in step.outputs:
            self.outputs.append(output)
            self._news.put_nowait(None)

    def _death(self, error: BaseException) -> None:
        self.deaths.append(error)
        self._news.put_nowait(None)

    def _refusal(self, key: str, error: Exception) -> None:
        self.refused.append((key, str(error)))
        self._news.put_nowait(None)

    async def until(self, count: int) -> None:
        """So much has been said."""
        async with asyncio.timeout(10):
            for _ in range(count):
                await self._news.get()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.mark.parametrize("bad_at", ["before the scheduler", "in the preparation", "in the scheduler"])
async def test_a_request_that_is_not_taken_fails_alone(heard: Heard, bad_at: str) -> None:
    engine = Engine(bad_at)
    core = heard.core()
    await core.start(lambda: engine)

    def prepare(request: Any) -> None:
        if request.request_id == "bad" and bad_at == "in the preparation":
            raise RuntimeError(bad_at)

    for name in ("first", "bad", "last"):
        core.add(types.SimpleNamespace(request_id=name), prepare)
    await heard.until(3)
    assert sorted(heard.outputs) == ["first", "last"]
    assert heard.refused == [("bad", bad_at)]
    assert heard.deaths == []
    assert engine.aborted == (["bad"] if bad_at == "in the scheduler" else [])
    await core.close()


async def test_what_a_step_raises_ends_the_engine_and_is_told(heard: Heard) -> None:
    engine = Engine("")
    engine.get_output = lambda: 1 / 0  # type: ignore[method-assign]
    core = heard.core()
    await core.start(lambda: engine)
    core.add(types.SimpleNamespace(request_id="any"), lambda request: None)
    await heard.until(1)
    assert isinstance(heard.deaths[0], ZeroDivisionError)
    await core.close()
