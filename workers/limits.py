"""Time limits of a handler: at the soft one it is told, at the hard one it is stopped, and what cannot be stopped is said.

start ........ soft: SoftTimeLimitExceeded is raised inside ....... hard: cancelled ....... END_WITHIN_S later: HandlerStuck
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from pipeline.errors import HandlerStuck, SoftTimeLimitExceeded, TimeLimitExceeded

END_WITHIN_S = 5.0  # a handler that was cancelled at its hard limit may clean up for so long

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds that a handler may run; None: as long as it takes."""

    soft_s: float | None = None
    hard_s: float | None = None

    def __post_init__(self) -> None:
        if any(limit is not None and limit <= 0 for limit in (self.soft_s, self.hard_s)):
            raise ValueError(f"time limits must be above 0: soft {self.soft_s}, hard {self.hard_s}")
        if self.soft_s is not None and self.hard_s is not None and self.soft_s >= self.hard_s:
            raise ValueError(
                f"the soft time limit ({self.soft_s:g} s) must come before the hard one ({self.hard_s:g} s)"
            )

    def __bool__(self) -> bool:
        return self.soft_s is not None or self.hard_s is not None


async def run_within(limits: TimeLimits, name: str, work: Coroutine[Any, Any, T]) -> T:
    """Run a handler's coroutine. A cancellation from outside is passed on to it, and waited for.

    Raises `TimeLimitExceeded` when it ran into its hard limit (whatever it made of that), `HandlerStuck` when it goes on all the
    same, and `SoftTimeLimitExceeded` when it let that through.
    """
    if not limits:
        return await work
    run = _Run(name, work)
    started_s = time.monotonic()
    if limits.soft_s is not None:
        await run.until(started_s + limits.soft_s)
        run.soften(limits.soft_s)
    if limits.hard_s is not None:
        await run.until(started_s + limits.hard_s)
        if not run.task.done():
            run.task.cancel()
            await run.until(started_s + limits.hard_s + END_WITHIN_S)
            passed = f"time limit of {limits.hard_s:g} s passed in {name}"
            if not run.task.done():
                raise HandlerStuck(passed)
            if not run.task.cancelled():
                run.task.exception()  # of a handler that was stopped: said by the limit
            raise TimeLimitExceeded(passed)
    await run.until(None)
    result: T = run.task.result()
    return result


class _Run:
    """A handler on its way: a task of its own, so that it can be told and stopped."""

    def __init__(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        self._name = name
        self._told: SoftTimeLimitExceeded | None = None  # to be raised inside instead of the next cancellation
        self.task = asyncio.create_task(self._run(work), name=name)

    async def until(self, at_s: float | None) -> None:
        """Wait until it has ended, at most until `at_s`."""
        while not self.task.done():
            left_s = None if at_s is None else at_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return
            try:
                await asyncio.wait([self.task], timeout=left_s)
            except asyncio.CancelledError:
                self._told = None
                self.task.cancel()

    def soften(self, soft_s: float) -> None:
        """Raise the soft limit where the handler waits now."""
        if not self.task.done() and not self.task.cancelling():
            self._told = SoftTimeLimitExceeded(f"soft time limit of {soft_s:g} s passed in {self._name}")
            self.task.cancel()

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return await _Driven(work, self._instead)

    def _instead(self, cancellation: asyncio.CancelledError) -> BaseException:
        if self._told is None:
            return cancellation
        told, self._told = self._told, None
        self.task.uncancel()  # the task was not cancelled: time-outs and task groups inside must not think so
        return told


class _Driven(Generator[Any, Any, T]):
    """Steps a coroutine as `await` does, except that a cancellation may become another error inside it."""

    def __init__(
        self, work: Coroutine[Any, Any, T], instead: Callable[[asyncio.CancelledError], BaseException]
    ) -> None:
        self.cr_await = work  # as a coroutine tells what it waits for: a dump of the stacks goes on there
        self._instead = instead

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def send(self, value: Any) -> Any:
        """Go on."""
        return self.cr_await.send(value)

    def throw(self, error: Any, value: Any = None, trace: Any = None) -> Any:
        """Raise inside it where it waits."""
        return self.cr_await.throw(self._instead(error) if isinstance(error, asyncio.CancelledError) else error)

    def close(self) -> None:
        """Nobody waits for it any more."""
        self.cr_await.close()


async def in_thread(call: Awaitable[T]) -> T:
    """Wait for what runs in a thread: nothing can stop that, so a cancellation is raised when it has ended, and its place is taken until
    then."""
    running = asyncio.ensure_future(call)
    cancellation: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        running.exception()
        raise cancellation
    return running.result()
