"""Questions to the workers of a pool and their answers, over channels: nothing of it is stored.

A question goes to all workers of the pool; it may name those that are meant. Each answers on a channel of that question alone.
A worker answers from its parent process, so a busy or stuck engine does not keep it silent. Workers that know nothing of this
do not listen, and a method that a worker does not know is answered as an error: old and new may run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import structlog

from pipeline.connection import Connection, Subscription
from pipeline.keys import PoolKeys
from pipeline.protocol import UNREADABLE
from pipeline.snapshot import take_snapshot

log = structlog.get_logger("baton.control")


class Question(msgspec.Struct, frozen=True, array_like=True, tag="ask.v1"):
    """What is asked: `method` names it, `to` the workers that are meant (empty: all), `ticket` the channel of the answers."""

    ticket: str
    method: str
    to: list[str] = []
    arguments: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="told.v1"):
    """What a worker says: a value, or why it has none."""

    worker: str
    value: Any = None
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Replies:
    """The answers by worker, the workers that were meant and are registered but did not answer in time, and all that are registered."""

    answers: dict[str, Answer]
    silent: list[str]
    registered: list[str]


class ControlClient:
    """Asks the workers of one pool."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self.pool = pool
        self._connection = connection
        self._keys = PoolKeys(pool)

    async def ask(
        self, method: str, arguments: Mapping[str, Any] | None = None, *, to: Sequence[str] = (), timeout_s: float = 1.0
    ) -> Replies:
        """Ask and gather until every registered worker that is meant has answered, or `timeout_s` is over. Where none of those that
        are named is registered, nobody is waited for.

        Raises `RedisUnavailable`.
        """
        question = Question(secrets.token_hex(8), method, list(to), dict(arguments or {}))
        subscription = await self._connection.subscribe(self._keys.told(question.ticket))
        answers: dict[str, Answer] = {}
        try:
            registered = sorted((await take_snapshot(self._connection, self._keys)).worker_names())
            expected = {
                name for name in registered if not to or name in to
            }  # others are taken, too, but not waited for
            await self._connection.command("PUBLISH", self._keys.ask(), msgspec.msgpack.encode(question))
            if expected or not to:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await _gather(subscription, answers, expected)
        finally:
            await subscription.close()
        return Replies(answers, sorted(expected - answers.keys()), registered)


async def _gather(subscription: Subscription, answers: dict[str, Answer], expected: set[str]) -> None:
    """Fill `answers` until nobody is missing; with nobody registered, until the caller's time is over."""
    decode = msgspec.msgpack.Decoder(Answer).decode
    async for _, data in subscription.messages():
        if data is None:
            continue
        try:
            answer = decode(data)
        except UNREADABLE as error:
            log.error("answer is not readable, left out", error=str(error))
            continue
        answers[answer.worker] = answer
        if expected and not expected - answers.keys():
            return
