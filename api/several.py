"""The answer to one HTTP request that became several requests, read to their ends together. They have one fate.

1. Submit all. Where one is refused, those before it are cancelled and the refusal is the answer.
2. Respond: wait for their ends, or write what they say as it comes, until the client leaves or the server has to. The first one that fails
   decides.
3. Settle: one that has not ended is left as a generation is, whatever the reason was.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Sequence

import anyio
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answers import ClientGone, Opening, has_come, leave, tell_end
from api.edge import REQUEST_ID
from api.service import Service
from pipeline.errors import BatonError, Draining
from pipeline.pools import ServedPool
from pipeline.stream import RequestStream


class Several(Response):
    """See the module's docstring. `openings` submit or attach, one each."""

    def __init__(self, service: Service, pool: ServedPool, openings: Sequence[Opening]) -> None:
        super().__init__()
        self._service = service
        self._pool = pool
        self._openings = openings
        self._streams: list[RequestStream] = []
        self._begin_s = time.monotonic()
        self._why = ""  # why some were left before they ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request to its end."""
        live = self._service.metrics.live.labels(self._pool.name)
        live.inc()
        try:
            response = await self._respond(scope, receive, send)
        except ClientGone:
            self._why = "client disconnected"
            return
        except SendTimeoutError:
            self._why = f"client did not read for {self._service.settings.send_timeout_s:g} s"
            return
        except asyncio.CancelledError:
            self._why = self._why or "server stopped"
            raise
        except BatonError as error:
            self._why = error.code
            raise
        finally:
            live.dec()
            with anyio.CancelScope(shield=True):
                await asyncio.gather(*(self._settle(stream) for stream in self._streams))
        if response is not None:
            await response(scope, receive, send)

    @abstractmethod
    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The answer, to be sent when all is settled; None where it was sent. Nothing that it began goes on."""

    async def _open(self, scope: Scope) -> None:
        for opening in self._openings:
            self._streams.append(await opening())
        scope[REQUEST_ID] = self._streams[0].id

    async def _settle(self, stream: RequestStream) -> None:
        """Leave nothing behind: not the reading, not a task that nobody wants."""
        ended = stream.ended
        if ended is None or stream.has_diverged:  # then it ended for this reader alone
            self._why = self._why or "another part of the same answer failed"
            await leave(self._pool, stream, self._why)
        async with stream:
            pass  # forgotten here
        tell_end(self._service, self._pool, stream, ended, self._why, time.monotonic() - self._begin_s)


class SeveralAnswer(Several):
    """One whole answer."""

    def __init__(self, service: Service, pool: ServedPool, openings: Sequence[Opening]) -> None:
        super().__init__(service, pool, openings)
        self._is_interrupted = False

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> Response:
        work = asyncio.create_task(self._answer(scope), name="several")
        try:
            with self._service.drain.interrupting(lambda: self._interrupt(work)):
                await has_come(work, receive, None)
            return Response(self._outcome(work), media_type="application/json")
        finally:
            with anyio.CancelScope(shield=True):
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    def _interrupt(self, work: asyncio.Task[bytes]) -> None:
        self._is_interrupted = True
        work.cancel()

    def _outcome(self, work: asyncio.Task[bytes]) -> bytes:
        if self._is_interrupted and work.cancelled():
            raise Draining(
                "the server shut down before the answer was complete: send the request again", retry_after_s=1.0
            )
        return work.result()

    async def _answer(self, scope: Scope) -> bytes:
        await self._open(scope)
        try:
            async with asyncio.TaskGroup() as group:
                for number, stream in enumerate(self._streams):
                    group.create_task(self._read(number, stream))
        except ExceptionGroup as errors:  # the first one is the reason, the others were cancelled for it
            raise errors.exceptions[0] from None
        return await self._body()

    @abstractmethod
    async def _read(self, number: int, stream: RequestStream) -> None:
        """Read one to its end. Raises what became of it where it is no answer."""

    @abstractmethod
    async def _body(self) -> bytes:
        """The JSON of all of them."""
