"""The signals of a worker's process: how it is asked to leave, and to show where it stands.

TERM and INT: warm, what is held is finished; again: cold, what is held is handed back; a third time: at once. QUIT: cold.
USR1: the stacks of this process and of its engine go to stderr, and both go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import structlog

from pipeline.processes import catches

log = structlog.get_logger("baton.worker")

WARM, COLD, AT_ONCE = 1, 2, 3


class Departure:
    """How far this process is on its way out. `install` first; `warm` and `cold` are what the worker does about it."""

    def __init__(self, engine_pid: Callable[[], int]) -> None:
        self._engine_pid = engine_pid
        self._asked = asyncio.Event()
        self._level = 0
        self._warm: Callable[[], None] = lambda: None
        self._cold: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Take the signals of this process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: self._ask(self._level + 1))
        loop.add_signal_handler(signal.SIGQUIT, lambda: self._ask(max(COLD, self._level + 1)))
        loop.add_signal_handler(signal.SIGUSR1, self._dump)
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)  # in C: also where the loop is stuck

    def lead(self, warm: Callable[[], None], cold: Callable[[], None]) -> None:
        """From now on these are called; at once for what was asked before."""
        self._warm, self._cold = warm, cold
        if self._level >= WARM:
            warm()
        if self._level >= COLD:
            cold()

    async def unless_asked(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work`; when this process is asked to leave first, it is cancelled and the answer is False."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return not self._asked.is_set()
            return False
        finally:
            for part in (task, asked):
                part.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)

    def _ask(self, level: int) -> None:
        self._level = level
        self._asked.set()
        if level == WARM:
            log.info("asked to leave: finishing what is held; a second signal hands it back")
            self._warm()
        elif level == COLD:
            log.warning("asked to leave now: handing back what is held; one more signal ends this process at once")
            self._cold()
        else:
            os._exit(1)

    def _dump(self) -> None:
        """The threads are written already; here the tasks of the loop, then the engine's process is asked for its own."""
        for task in asyncio.all_tasks():
            frames = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in awaiting(task.get_coro()))
            sys.stderr.write(f"Stack for {task!r} (most recent call last):\n{''.join(frames.format())}")
        sys.stderr.flush()
        pid = self._engine_pid()
        if pid and catches(pid, signal.SIGUSR1):  # one that has only begun to start would end of it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)


def awaiting(work: Any) -> Iterator[types.FrameType]:
    """The frames of a suspended coroutine, from its own to where it waits. asyncio shows the first one alone."""
    while work is not None:
        frame = _any_of(work, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            yield frame
        work = _any_of(work, "cr_await", "gi_yieldfrom", "ag_await")


def _any_of(work: object, *names: str) -> Any:
    """The same fact has a name of its own on coroutines, generators and asynchronous generators."""
    return next((value for name in names if (value := getattr(work, name, None)) is not None), None)
