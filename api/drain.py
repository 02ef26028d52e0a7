"""How this process leaves: no new requests from the first moment, a grace for those that run, then they are told and ended.

running --begin--> draining (503 for new ones, /ready 503) --grace_s--> over: every answer is interrupted
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from pipeline.errors import Draining

COME_BACK_S = 1.0  # another replica takes the request at once


class Drain:
    """The leaving of one process."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._interrupts: set[Callable[[], None]] = set()
        self.has_begun = False

    def begin(self) -> None:
        """Start leaving. May be called twice."""
        if not self.has_begun:
            self.has_begun = True
            asyncio.get_running_loop().call_later(self._grace_s, self._end)

    def check(self) -> None:
        """Raises Draining when new requests must go elsewhere."""
        if self.has_begun:
            raise Draining("this server is shutting down: send the request again", retry_after_s=COME_BACK_S)

    @contextlib.contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Call `interrupt` once if the grace ends within this context."""
        self._interrupts.add(interrupt)
        try:
            yield
        finally:
            self._interrupts.discard(interrupt)

    @contextlib.asynccontextmanager
    async def within_grace(self) -> AsyncIterator[None]:
        """What is within this ends when the grace does: raises Draining then."""
        try:
            async with asyncio.timeout(None) as limit:
                with self.interrupting(lambda: limit.reschedule(0)):
                    yield
        except TimeoutError as error:
            if not limit.expired():  # it is of what was done
                raise
            raise Draining("this server has shut down: send the request again", retry_after_s=COME_BACK_S) from error

    def _end(self) -> None:
        for interrupt in tuple(self._interrupts):
            interrupt()
