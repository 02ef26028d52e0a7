"""Files by which a probe sees a worker, without Redis and without a program of its own: how fresh they are is the answer.

    alive   touched while the worker's loop turns, from the first moment on: one that waits for Redis or loads a model is alive
    ready   touched while it is at work: its engine is up, Redis has heard of it and answers, it is not leaving; else it is not there

They lie in `worker.beat_dir`, which is one worker's own. A worker that is killed leaves files that age.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

from pipeline.errors import ConfigError

INTERVAL_S = 1.0
ALIVE, READY = "alive", "ready"

log = structlog.get_logger("baton.worker")


class Beat:
    """Writes both files of a folder; without a folder, nothing. Raises `ConfigError` where the folder cannot be had."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder) if folder else None
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._write(is_ready=False)
        except OSError as error:
            raise ConfigError(f"worker.beat_dir = {folder}: {error.strerror}") from error

    def show(self, *, is_ready: bool) -> None:
        """This worker lives, and is at work or not."""
        try:
            self._write(is_ready=is_ready)
        except OSError as error:
            log.warning("probes cannot see this worker", folder=str(self._folder), error=str(error))

    def end(self) -> None:
        """It has left."""
        if self._folder is not None:
            for name in (READY, ALIVE):
                (self._folder / name).unlink(missing_ok=True)

    def _write(self, *, is_ready: bool) -> None:
        if self._folder is None:
            return
        (self._folder / ALIVE).touch()
        if is_ready:
            (self._folder / READY).touch()
        else:
            (self._folder / READY).unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def kept(self, is_ready: Callable[[], bool]) -> AsyncIterator[None]:
        """Meanwhile the files tell each second how this worker stands."""

        async def show() -> None:
            while True:
                self.show(is_ready=is_ready())
                await asyncio.sleep(INTERVAL_S)

        showing = asyncio.create_task(show(), name="beat")
        try:
            yield
        finally:
            showing.cancel()


@contextlib.asynccontextmanager
async def beating(folder: str, is_ready: Callable[[], bool]) -> AsyncIterator[None]:
    """The same for a whole life, behind which no file is left. Raises as `Beat`."""
    beat = Beat(folder)
    try:
        async with beat.kept(is_ready):
            yield
    finally:
        beat.end()
