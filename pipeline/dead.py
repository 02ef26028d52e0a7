"""Dead letters: requests that ended because no worker could do them, or read them.

Each is an entry of the pool's dead-letter stream; the request's own record stays beside it for a time. A replay makes a new
request of that record; dropping forgets both.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import AsyncIterator

import msgspec

from pipeline.config import QueueSettings, RouterSettings
from pipeline.connection import Connection
from pipeline.errors import BatonError, NotFound, WireError
from pipeline.keys import PoolKeys
from pipeline.protocol import UNREADABLE, Request
from pipeline.queue import Admission, Limits, PoolQueue
from pipeline.routing import DisaggregatedRouter
from pipeline.snapshot import take_snapshot, text, text_pairs

PAGE = 500


class DeadLetter(msgspec.Struct, frozen=True):
    """One entry: where the request was and why it died."""

    entry: str
    id: str
    stage: str
    lane: str
    worker: str
    attempts: int
    reason: str

    @property
    def time_ms(self) -> int:
        """When it died, by Redis's clock."""
        return int(self.entry.partition("-")[0])


class DeadLetters:
    """The dead letters of one pool."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self.pool = pool
        self._connection = connection
        self._keys = PoolKeys(pool)
        self._queue = PoolQueue(connection, pool)

    async def newest_first(self) -> AsyncIterator[DeadLetter]:
        """All of them. Raises `RedisUnavailable`."""
        end = "+"
        while True:
            rows = await self._connection.command("XREVRANGE", self._keys.dead(), end, "-", "COUNT", PAGE)
            for entry, fields in rows:
                yield _letter(text(entry), text_pairs(fields))
            if len(rows) < PAGE:
                return
            end = f"({text(rows[-1][0])}"

    async def find(self, request_id: str) -> DeadLetter:
        """The entry of a request. Raises `NotFound`."""
        async for letter in self.newest_first():
            if letter.id == request_id:
                return letter
        raise NotFound(
            f"{request_id}: no dead letter of pool {self.pool} has this id; `baton dead list` shows those there are"
        )

    async def request(self, letter: DeadLetter) -> Request:
        """What was asked for. Raises `NotFound` when its record is gone, `WireError` when it cannot be read."""
        body = await self._connection.command("HGET", self._keys.request(letter.id), "body")
        if body is None:
            raise NotFound(
                f"{letter.id}: its record is gone, only its dead letter is left: it can be dropped, not replayed"
            )
        try:
            return msgspec.msgpack.decode(body, type=Request)
        except UNREADABLE as error:
            raise WireError(
                f"{letter.id}: its record is not readable, it can be dropped, not replayed: {error}"
            ) from error

    async def replay(self, letter: DeadLetter, queue: QueueSettings, router: RouterSettings) -> str:
        """Admit the request anew under a fresh id, with a fresh deadline, through the limits of the queue; returns the id.

        Raises as `request` does, and `QueueFull`. A replay whose reply was lost may be repeated: the fresh id follows from the
        entry, so there is one new request, and then the entry is gone.
        """
        request = await self.request(letter)
        fields = await self._connection.command("HMGET", self._keys.request(letter.id), "state", "priority")
        state, priority = (text(field) for field in fields)
        if state != "dead":
            raise BatonError(f"{letter.id}: it is {state}, not dead: not replayed")
        new_id = _new_id(self.pool, letter)
        again = msgspec.structs.replace(
            request, id=new_id, created_s=int(time.time()), resumable=True,  # nobody waits at an API for it
            input=msgspec.structs.replace(request.input, request_id=new_id),
        )  # fmt: skip
        stage, first_lane = await self._place(request, letter, priority, router)
        lane = queue.lane(priority)
        limits = Limits(
            lane.max_waiting_tasks, lane.max_waiting_tokens, lane.deadline_s, queue.result_ttl_s, queue.dead_ttl_s
        )
        admission = Admission(again, stage, first_lane, "", priority=priority, replay_of=letter.id)
        await self._queue.admit(admission, limits)
        await self._connection.command("XDEL", self._keys.dead(), letter.entry)
        return new_id

    async def _place(
        self, request: Request, letter: DeadLetter, priority: str, router: RouterSettings
    ) -> tuple[str, str]:
        """Stage and lane where it starts again: a generation where the router says now, a task of one's own on its own queue."""
        if request.task is not None:
            return letter.stage, priority
        snapshot = await take_snapshot(self._connection, self._keys)
        route = DisaggregatedRouter(snapshot.router(router)).route(
            len(request.input.token_ids), 0, snapshot.load(), priority, n=request.input.sampling_options.n
        )
        return route.stage, route.lane

    async def drop(self, letter: DeadLetter) -> None:
        """Delete the entry and all that is kept of the request. Raises `BatonError` when it is not dead."""
        if state := await self._queue.drop(letter.id, letter.entry):
            raise BatonError(f"{letter.id}: it is {state}, not dead: not dropped")


def _letter(entry: str, fields: dict[str, str]) -> DeadLetter:
    return DeadLetter(
        entry, fields.get("id", ""), fields.get("stage", ""), fields.get("lane", ""), fields.get("worker", ""),
        int(fields.get("attempts", 0)), fields.get("reason", ""),
    )  # fmt: skip


def _new_id(pool: str, letter: DeadLetter) -> str:
    """As hard to guess as the id that it is made of, and the same each time."""
    digest = hashlib.blake2b(f"{letter.entry} {letter.id}".encode(), digest_size=16).digest()
    return f"{pool}-{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
