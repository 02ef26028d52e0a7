"""The only module that imports the Redis library: commands, scripts and subscriptions with limits on every wait.

redis-py's own defaults (5 s socket time-out and ten silent retries) break blocking reads and repeat commands that are not
safe to repeat; here the library never retries. Scripts are repeated, because each may be called twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib import resources
from typing import Any

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pipeline.config import RedisSettings
from pipeline.errors import ConfigError, QueueFull, RedisUnavailable
from pipeline.keys import lua_prelude

_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError, OSError)

# what a server says while it cannot write: full, a replica (fail-over), without disk, in a long script, in a cluster that moves
_PASSING = (
    exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.ClusterDownError, exceptions.TryAgainError
)  # fmt: skip
_PASSING_WORDS = (
    "OOM command not allowed",
    "READONLY",
    "MISCONF",
    "BUSY ",
    "NOREPLICAS",
)  # 6.2 wraps what a script was told

MAX_CONNECTIONS = 32

Arg = str | bytes | int | float


class Script:
    """A Lua script of `pipeline/scripts`, with the key names and the shared functions in front of it."""

    def __init__(self, name: str) -> None:
        folder = resources.files("pipeline") / "scripts"
        parts = (lua_prelude(), (folder / "_lib.lua").read_text(), (folder / f"{name}.lua").read_text())
        self.name = name
        self.source = "\n".join(parts)
        self.sha = ""


class Connection:
    """Commands and scripts over a pool of connections; `subscribe` opens one of its own."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._client = _client(settings, settings.timeout_s)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)  # more calls than that wait for one another, they do not fail
        self._subscriptions: list[Subscription] = []

    async def call(self, script: Script, root: str, *args: Arg, waits_for_memory: bool = True) -> Any:
        """Run a script; repeats it after a lost connection until `timeout_s` is over, then raises `RedisUnavailable`.

        Raises `QueueFull` at once when Redis refuses the write because its memory is full, unless it `waits_for_memory`.
        """
        give_up = time.monotonic() + self._settings.timeout_s
        delay_s = 0.02
        while True:
            try:
                return await self._evaluate(script, root, args)
            except (*_LOST, exceptions.ResponseError) as error:
                if not _passes(error):
                    raise  # our own mistake: repeating it cannot help
                if _is_out_of_memory(error) and not waits_for_memory:
                    full = f"Redis is out of memory ({script.name}): nothing was stored, try again later"
                    raise QueueFull(full, retry_after_s=5.0) from error
                if time.monotonic() + delay_s > give_up:
                    raise RedisUnavailable(
                        f"no answer from Redis to {script.name} within {self._settings.timeout_s:g} s: {error}"
                    ) from error
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
                delay_s = min(delay_s * 2, 1.0)

    async def _evaluate(self, script: Script, root: str, args: Sequence[Arg]) -> Any:
        if not script.sha:
            script.sha = await self._execute("SCRIPT", "LOAD", script.source)
        try:
            return await self._execute("EVALSHA", script.sha, 1, root, *args)
        except exceptions.NoScriptError:  # the server was restarted or flushed its scripts
            script.sha = await self._execute("SCRIPT", "LOAD", script.source)
            return await self._execute("EVALSHA", script.sha, 1, root, *args)

    async def _execute(self, *args: Arg) -> Any:
        async with self._slots:
            with _cancellation_kept():
                return await self._client.execute_command(*args)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    async def command(self, *args: Arg) -> Any:
        """One plain command that is safe to lose. Raises `RedisUnavailable`."""
        try:
            return await self._execute(*args)
        except (*_LOST, exceptions.ResponseError) as error:
            if not _passes(error):
                raise
            raise RedisUnavailable(f"no answer from Redis to {args[0]!s}: {error}") from error

    async def commands(self, *rows: Sequence[Arg]) -> list[Any]:
        """Several plain commands in one round trip, not atomic. Raises `RedisUnavailable`."""
        try:
            async with self._slots, self._client.pipeline(transaction=False) as pipe:
                for row in rows:
                    pipe.execute_command(*row)
                with _cancellation_kept():
                    return list(await pipe.execute())
        except (*_LOST, exceptions.ResponseError) as error:
            if not _passes(error):
                raise
            raise RedisUnavailable(f"no answer from Redis to {rows[0][0]!s}: {error}") from error

    async def subscribe(self, *channels: str) -> Subscription:
        """A subscription that is already in force when this returns."""
        subscription = Subscription(self._settings, channels)
        await subscription.start()
        self._subscriptions.append(subscription)
        return subscription

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        await self._client.aclose()


class Subscription:
    """Messages of some channels. Loss is silent in Redis: each time a channel is subscribed anew that is said, too."""

    def __init__(self, settings: RedisSettings, channels: Sequence[str]) -> None:
        self._settings = settings
        self._client = _client(settings, None)
        self._pubsub = self._client.pubsub()
        self.channels = set(channels)
        self._is_lost = False  # a call found the connection lost: what Redis sends is not for these channels any more

    async def start(self) -> None:
        """Subscribe and wait for Redis to say so. Raises `RedisUnavailable`."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._pubsub.subscribe(*self.channels)
                for _ in self.channels:
                    await self._pubsub.parse_response(block=True)
        except _LOST as error:
            raise RedisUnavailable(f"cannot subscribe to {sorted(self.channels)}: {error}") from error

    async def add(self, channel: str) -> None:
        """Subscribe to one more channel; `messages` says when it is in force, after a reconnection too."""
        self.channels.add(channel)
        try:
            await self._pubsub.subscribe(channel)
        except _LOST:
            self._is_lost = True

    async def remove(self, channel: str) -> None:
        """Unsubscribe from one channel."""
        self.channels.discard(channel)
        try:
            await self._pubsub.unsubscribe(channel)
        except _LOST:
            self._is_lost = True

    async def messages(self) -> AsyncIterator[tuple[str, bytes | None]]:
        """(channel, data) of each message; data None when the channel was subscribed (anew): read what you may have missed."""
        while True:
            try:
                reply = await self._pubsub.parse_response(block=True)
            except _LOST:
                self._is_lost = True
            if self._is_lost:
                await self._resubscribe()
                continue
            if reply is None:
                continue
            kind = reply[0]
            if kind == b"message":
                yield reply[1].decode(), reply[2]
            elif kind == b"subscribe":
                yield reply[1].decode(), None

    async def _resubscribe(self) -> None:
        """Returns when Redis has taken the same channels on a new connection, however long it was away."""
        delay_s = 0.02
        while True:
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(delay_s * 2, 1.0)
            with contextlib.suppress(*_LOST):
                await self._pubsub.aclose()  # type: ignore[no-untyped-call]
                self._pubsub = self._client.pubsub()
                self._is_lost = False
                await self._pubsub.subscribe(*self.channels)
                return

    async def close(self) -> None:
        """Close the connection; a running `messages` ends with its task. May be called twice."""
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self._client.aclose()


@contextlib.contextmanager
def _cancellation_kept() -> Iterator[None]:
    """A cancellation that came while redis-py waited is raised after its call: its `asyncio.wait_for` swallows one that
    arrives together with the end of a write (Python 3.11), and a task that was cancelled would then run for ever."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:  # whatever else the call raised: a caller would take that for a lost connection and go on
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


def _passes(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, exceptions.AuthenticationError):
        return False
    is_refusal = isinstance(error, exceptions.ResponseError) and not isinstance(error, _PASSING)
    return not is_refusal or any(word in str(error) for word in _PASSING_WORDS)


def _is_out_of_memory(error: Exception) -> bool:
    # 6.2 wraps a script's refusal in a plain response error, later servers have a type of their own
    return isinstance(error, exceptions.OutOfMemoryError) or "OOM command not allowed" in str(error)


def _client(settings: RedisSettings, timeout_s: float | None) -> redis.asyncio.Redis:
    options: dict[str, Any] = {} if settings.url.startswith("unix") else {"socket_keepalive": True}
    try:
        return redis.asyncio.Redis.from_url(
            settings.url,
            **options,
            socket_timeout=timeout_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError:  # its text may hold a part of the password
        text = "redis.url: expected redis://host:6379/0, rediss://host:6379/0 or unix:///path/redis.sock"
        raise ConfigError(text) from None
