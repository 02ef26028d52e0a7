"""The only module that imports the Redis library: commands, scripts and subscriptions with limits on every wait.

redis-py's own defaults (5 s socket time-out and ten silent retries) break blocking reads and repeat commands that are not
safe to repeat; here the library never retries. Scripts are repeated, because each may be called twice.

Behind Sentinels each new connection asks them who the master is. A server that answers READONLY may have been demoted: its
connections are given up. A subscription looks at an interval whether its server still lives and is still the master.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from importlib import resources
from typing import Any, TypeVar

import redis.asyncio
import structlog
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff

from pipeline.config import RedisSettings
from pipeline.errors import ConfigError, QueueFull, RedisUnavailable
from pipeline.keys import lua_prelude
from pipeline.sentinel_url import FORM as SENTINEL_FORM
from pipeline.sentinel_url import SentinelUrl, is_sentinel_url, parse_sentinel_url
from pipeline.wording import without_passwords

log = structlog.get_logger("baton.redis")

_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError, OSError)

# what a server says while it cannot write: full, a replica (fail-over), without disk, in a long script, in a cluster that moves,
# or while somebody changes who may do what or flushes the scripts (again, between loading one and calling it)
_PASSING = (
    exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.ClusterDownError, exceptions.TryAgainError,
    exceptions.NoPermissionError, exceptions.NoScriptError,
)  # fmt: skip
_PASSING_WORDS = (
    "OOM command not allowed",
    "READONLY",
    "MISCONF",
    "BUSY ",
    "NOREPLICAS",
    "Protocol error: unauthenticated",  # to long commands, before it looks who asks
)  # 6.2 wraps what a script was told

MAX_CONNECTIONS = 32
FIRST_DELAY_S, LONGEST_DELAY_S = 0.02, 1.0  # between attempts
FIRST_REACH_S, LONGEST_REACH_S = 1.0, 8.0  # between those of a process that starts
CHECK_S = (
    2.0  # a subscription that was silent for so long asks whether its server lives; behind Sentinels, who the master is
)
LOOK_UP_S = 1.0  # longest wait for one Sentinel, and least time between two departures from servers that take no writes

T = TypeVar("T")
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
    """Commands and scripts over a pool of connections; `subscribe` opens one of its own. Raises `ConfigError` for a wrong address."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._sentinels = _Sentinels(settings) if is_sentinel_url(settings.url) else None
        self._client = _client(settings, settings.timeout_s, self._sentinels)
        self._left_s = -math.inf  # when a server that took no writes was last given up
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)  # more calls than that wait for one another, they do not fail
        self._subscriptions: list[Subscription] = []

    async def reach(self) -> None:
        """Return when Redis answers; as long as it does not, say so and ask again, later each time. A process that starts waits here.

        Raises `RedisUnavailable` when `connect_s` is over, or at once when Redis refuses who we are.
        """
        give_up_s = time.monotonic() + self._settings.connect_s
        delay_s = FIRST_REACH_S
        while True:
            try:
                await self.command("PING")
                return
            except RedisUnavailable as error:
                left_s = give_up_s - time.monotonic()
                if left_s <= 0 or (isinstance(error.__cause__, Exception) and _is_of_who_we_are(error.__cause__)):
                    raise
                delay_s = min(delay_s, left_s)
                log.warning("waiting for Redis", error=str(error), then=f"trying again in {delay_s:.2g} s")
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_REACH_S)

    async def call(self, script: Script, root: str, *args: Arg, waits_for_memory: bool = True) -> Any:
        """Run a script; repeats it after a lost connection until `timeout_s` is over, then raises `RedisUnavailable`.

        Raises `QueueFull` at once when Redis refuses the write because its memory is full, unless it `waits_for_memory`.
        """
        give_up = time.monotonic() + self._settings.timeout_s
        delay_s = FIRST_DELAY_S
        while True:
            try:
                return await self._evaluate(script, root, args)
            except (*_LOST, exceptions.ResponseError) as error:
                if not _passes(error):
                    raise  # our own mistake: repeating it cannot help
                await self._note(error)
                if _is_out_of_memory(error) and not waits_for_memory:
                    full = "Redis is out of memory: nothing was stored, try again later"
                    raise QueueFull(full, retry_after_s=5.0) from error
                if time.monotonic() + delay_s > give_up:
                    raise _unavailable(self._settings, error, script.name) from error
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
                delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def _evaluate(self, script: Script, root: str, args: Sequence[Arg]) -> Any:
        if not script.sha:
            script.sha = await self._execute("SCRIPT", "LOAD", script.source)
        try:
            return await self._execute("EVALSHA", script.sha, 1, root, *args)
        except exceptions.NoScriptError:  # the server was restarted or flushed its scripts
            script.sha = await self._execute("SCRIPT", "LOAD", script.source)
            return await self._execute("EVALSHA", script.sha, 1, root, *args)

    async def _execute(self, *args: Arg) -> Any:
        async with self._slot():
            with _library_call():
                return await self._client.execute_command(*args)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A turn to use a connection: when none is free in time, all of them wait for Redis."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise exceptions.ConnectionError(f"all {MAX_CONNECTIONS} connections wait for an answer") from None
        try:
            yield
        finally:
            self._slots.release()

    async def command(self, *args: Arg) -> Any:
        """One plain command that is safe to lose. Raises `RedisUnavailable`."""
        with_it: Callable[[], Awaitable[Any]] = functools.partial(self._client.execute_command, *args)
        return await self.lent(str(args[0]), with_it)

    @property
    def pool(self) -> Any:
        """The connections, for a library that speaks to Redis by itself: it reaches what we reach, through Sentinels and unix sockets,
        if each call of it goes through `lent`."""
        return self._client.connection_pool

    async def lent(self, asked: str, call: Callable[[], Awaitable[T]]) -> T:
        """A call of the library, or of one that uses its `pool`, in its turn; not repeated. Raises `RedisUnavailable`."""
        try:
            async with self._slot():
                with _library_call():
                    return await call()
        except (*_LOST, exceptions.ResponseError) as error:
            if not _passes(error):
                raise
            await self._note(error)
            raise _unavailable(self._settings, error, asked) from error

    async def told(self, *args: Arg) -> Any:
        """As `command` for what a server may refuse to tell (managed ones lack CONFIG): None then."""
        try:
            return await self._execute(*args)
        except exceptions.ResponseError:
            return None
        except _LOST as error:
            raise _unavailable(self._settings, error, args[0]) from error

    async def commands(self, *rows: Sequence[Arg]) -> list[Any]:
        """Several plain commands in one round trip, not atomic. Raises `RedisUnavailable`."""
        try:
            async with self._slot(), self._client.pipeline(transaction=False) as pipe:
                for row in rows:
                    pipe.execute_command(*row)
                with _library_call():
                    return list(await pipe.execute())
        except (*_LOST, exceptions.ResponseError) as error:
            if not _passes(error):
                raise
            await self._note(error)
            raise _unavailable(self._settings, error, rows[0][0]) from error

    async def _note(self, error: Exception) -> None:
        """A server that takes no writes may have been demoted. At most once a second: a replica that stays one gets no storm of
        connections."""
        now_s = time.monotonic()
        if _is_read_only(error) and now_s - self._left_s >= LOOK_UP_S:
            self._left_s = now_s
            log.warning("this Redis takes no writes, connecting anew", error=str(error))
            await self._leave()

    async def _leave(self) -> None:
        """Give up all connections, those in use when their call is over: the next ones lead to whoever is master then."""
        pool = self._client.connection_pool
        await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
        await pool.disconnect(inuse_connections=False)
        for subscription in self._subscriptions:
            await subscription.drop()

    async def subscribe(self, *channels: str) -> Subscription:
        """A subscription that is already in force when this returns."""
        subscription = Subscription(self._settings, channels, self._sentinels, self._leave)
        await subscription.start()
        self._subscriptions = [other for other in self._subscriptions if not other.is_closed] + [subscription]
        return subscription

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        await self._client.aclose()
        if self._sentinels is not None:
            await self._sentinels.close()


class Subscription:
    """Messages of some channels. Loss is silent in Redis: each time a channel is subscribed anew that is said, too.

    A server that vanished without closing is noticed within `redis.timeout_s` and two checks, a new master behind Sentinels by the
    next check.
    """

    def __init__(
        self, settings: RedisSettings, channels: Sequence[str], sentinels: _Sentinels | None,
        leave: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._sentinels = sentinels
        self._leave = leave  # called when another server is the master now: commands have to go there, too
        self._client = _client(settings, None, sentinels)
        self._pubsub = self._client.pubsub()
        self._delay_s = FIRST_DELAY_S  # before the next attempt to subscribe anew
        self._waits_since_s = math.inf  # since when `messages` waits for Redis; infinite while it does not
        self.is_closed = False
        self.channels = set(channels)

    async def start(self) -> None:
        """Subscribe and wait for Redis to say so. Raises `RedisUnavailable`."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                with _library_call():
                    await self._pubsub.subscribe(*self.channels)
                for _ in self.channels:
                    await self._pubsub.parse_response(block=True)
        except (*_LOST, exceptions.ResponseError) as error:
            await self.close()
            raise _unavailable(self._settings, error, *sorted(self.channels)) from error

    async def add(self, channel: str) -> None:
        """Subscribe to one more channel; `messages` says when it is in force, at once or when Redis is back."""
        self.channels.add(channel)
        await self._say("SUBSCRIBE", channel)

    async def remove(self, channel: str) -> None:
        """Unsubscribe from one channel."""
        self.channels.discard(channel)
        await self._say("UNSUBSCRIBE", channel)

    async def messages(self) -> AsyncIterator[tuple[str, bytes | None]]:
        """(channel, data) of each message; data None when the channel was subscribed (anew): read what you may have missed."""
        watch = asyncio.create_task(self._watch(), name="subscription check")
        try:
            while True:
                self._waits_since_s = time.monotonic()
                try:
                    self._check_connected()
                    reply = await self._pubsub.parse_response(block=True)
                except (*_LOST, exceptions.ResponseError) as error:
                    self._waits_since_s = math.inf
                    await self._resubscribe(error)
                    continue
                self._waits_since_s = math.inf  # what the reader does now is no silence of Redis
                self._delay_s = FIRST_DELAY_S
                if reply is None:
                    continue
                kind = reply[0]
                if kind == b"message":
                    yield reply[1].decode(), reply[2]
                elif kind == b"subscribe":
                    yield reply[1].decode(), None
        finally:
            watch.cancel()

    def _check_connected(self) -> None:
        """redis-py would connect by itself, and to channels that it knows of: those of the start, without what came or went since."""
        if self._pubsub.connection is None or not self._pubsub.connection.is_connected:
            raise exceptions.ConnectionError("the line was given up")

    async def _resubscribe(self, error: Exception) -> None:
        """Returns when the same channels were sent on a new connection, however long Redis was away. The pause between attempts
        grows until Redis has taken them: a server that takes connections and refuses what they say is asked once a second."""
        if self._delay_s == FIRST_DELAY_S:
            log.warning("subscription lost, subscribing anew", error=_why(self._settings, error))
            log.debug("subscription lost", channels=sorted(self.channels), error=repr(error))
        while True:
            await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.5))
            self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)
            with contextlib.suppress(*_LOST):
                async with asyncio.timeout(self._settings.timeout_s):
                    await self._pubsub.aclose()  # type: ignore[no-untyped-call]
                    self._pubsub = self._client.pubsub()
                    sent = set(self.channels)
                    with _library_call():
                        await self._pubsub.subscribe(*sent)
                    for channel in self.channels - sent:  # added while it connected
                        await self._say("SUBSCRIBE", channel)
                return

    async def _watch(self) -> None:
        """While nothing comes, ask for a sign of life; without one drop the line. When another server is the master now, leave."""
        asked_s = -math.inf
        while True:
            await asyncio.sleep(CHECK_S)
            now_s = time.monotonic()
            if await self._has_moved():
                log.warning("another Redis is the master now, connecting to it")
                await self._leave()
            elif self._waits_since_s < asked_s:  # since before it was asked
                if now_s - asked_s > self._settings.timeout_s:
                    log.warning("no sign of life on a subscription", channels=sorted(self.channels))
                    await self.drop()
            elif now_s - self._waits_since_s > CHECK_S / 2:
                asked_s = now_s
                await self._say("PING")

    async def _has_moved(self) -> bool:
        connection: Any = self._pubsub.connection
        if self._sentinels is None or connection is None or not connection.is_connected:
            return False
        try:
            return await self._sentinels.discover_master() != (connection.host, connection.port)
        except exceptions.ConnectionError:
            return False  # nobody knows of another one

    async def _say(self, *words: str) -> None:
        """Send a command whose answer `messages` reads; on a lost line nothing, for it is subscribed anew with all channels."""
        connection: Any = self._pubsub.connection
        if connection is None or not connection.is_connected:
            return
        with contextlib.suppress(*_LOST):
            async with asyncio.timeout(self._settings.timeout_s):
                with _library_call():
                    await connection.send_command(*words, check_health=False)

    async def drop(self) -> None:
        """Give the connection up; `messages` subscribes anew, behind Sentinels to whoever is master then."""
        connection: Any = self._pubsub.connection
        if connection is not None and not self.is_closed:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Close the connection; a running `messages` ends with its task. May be called twice."""
        self.is_closed = True
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self._client.aclose()


class _Sentinels:
    """Says who the master is. All are asked, and the answer with the highest epoch wins: one that was cut off misleads nobody."""

    def __init__(self, settings: RedisSettings) -> None:
        self.url = parse_sentinel_url(settings.url)
        limit_s = min(LOOK_UP_S, settings.timeout_s)
        self._clients = [
            redis.asyncio.Redis(
                host=host, port=port, username=self.url.sentinel_username, password=self.url.sentinel_password,
                ssl=self.url.is_tls, **_options(limit_s, limit_s),
            )
            for host, port in self.url.sentinels
        ]  # fmt: skip

    async def discover_master(self, _: str = "") -> tuple[str, int]:
        """Its address; the pool of connections asks with the name. Raises redis-py's ConnectionError when nobody knows."""
        answers = await asyncio.gather(*(self._ask(client) for client in self._clients), return_exceptions=True)
        known = [answer for answer in answers if isinstance(answer, tuple)]
        if known:
            return max(known)[1:]
        said = "; ".join(
            f"{host}:{port}: {error}" for (host, port), error in zip(self.url.sentinels, answers, strict=True)
        )
        raise exceptions.ConnectionError(f"no Sentinel knows the master {self.url.master!r} ({said})")

    async def _ask(self, client: redis.asyncio.Redis) -> tuple[int, str, int]:
        with _library_call():
            row = await client.execute_command("SENTINEL", "MASTER", self.url.master)  # type: ignore[no-untyped-call]
        fields = {name.decode(): value.decode() for name, value in zip(row[::2], row[1::2], strict=True)}
        return int(fields["config-epoch"]), fields["ip"], int(fields["port"])

    async def close(self) -> None:
        """Close the connections to them. May be called twice."""
        for client in self._clients:
            await client.aclose()


@contextlib.contextmanager
def _library_call() -> Iterator[None]:
    """Around each call of redis-py, for what it and uvloop get wrong.

    A cancellation that came while redis-py waited is raised after its call: its `asyncio.wait_for` swallows one that arrives
    together with the end of a write (Python 3.11), and a task that was cancelled would then run for ever. Writing to a line
    that the server closed a moment ago is a lost connection, for which uvloop has only a RuntimeError.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    except RuntimeError as error:
        if "the handler is closed" not in str(error):
            raise
        raise exceptions.ConnectionError("the server closed the line") from error
    finally:  # whatever else the call raised: a caller would take that for a lost connection and go on
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


def _passes(error: Exception) -> bool:
    """Whether the same call may succeed later, as soon as Redis or whoever runs it has put things right."""
    is_refusal = isinstance(error, exceptions.ResponseError) and not isinstance(error, _PASSING)
    return not is_refusal or any(word in str(error) for word in _PASSING_WORDS)


def _is_out_of_memory(error: Exception) -> bool:
    # 6.2 wraps a script's refusal in a plain response error, later servers have a type of their own
    return isinstance(error, exceptions.OutOfMemoryError) or "OOM command not allowed" in str(error)


def _is_read_only(error: Exception) -> bool:
    return isinstance(error, exceptions.ReadOnlyError) or "READONLY" in str(error)


def _unavailable(settings: RedisSettings, error: Exception, *asked: Arg) -> RedisUnavailable:
    """What everybody is told; what was asked (commands, channels) is only for who looks for a mistake of ours."""
    log.debug("no answer from Redis", asked=asked, error=repr(error))
    return RedisUnavailable(_why(settings, error))


def _why(settings: RedisSettings, error: Exception) -> str:
    """One wording for whoever cannot be reached, and for a refusal what has to be put right."""
    redis_there = f"Redis at {without_passwords(settings.url)}"
    if _is_of_who_we_are(error):
        return f"{redis_there} refuses the user or password of redis.url ({error})"
    if isinstance(error, exceptions.ResponseError):
        return f"{redis_there} refuses it for now ({error})"
    return f"{redis_there} does not answer ({_reason(settings, error)})"


def _is_of_who_we_are(error: Exception) -> bool:
    refusals = (exceptions.AuthenticationError, exceptions.NoPermissionError)
    is_wrapped = isinstance(error.__cause__, refusals)  # redis-py wraps what it hears while it connects
    return isinstance(error, refusals) or is_wrapped or "unauthenticated" in str(error)


def _reason(settings: RedisSettings, error: Exception) -> str:
    """In the words of the operating system, where it says why: redis-py adds numbers."""
    causes = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, (exceptions.TimeoutError, TimeoutError)) for cause in causes):
        return f"nothing within {settings.timeout_s:g} s"
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno:
            return str(cause.strerror) if isinstance(cause, socket.gaierror) else os.strerror(cause.errno)
    return str(error) or type(error).__name__


def _client(settings: RedisSettings, timeout_s: float | None, sentinels: _Sentinels | None) -> redis.asyncio.Redis:
    options = _options(timeout_s, settings.timeout_s)
    if sentinels is not None:
        url: SentinelUrl = sentinels.url
        pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            url.master, sentinels, db=url.db, username=url.username, password=url.password, ssl=url.is_tls,
            **options, socket_keepalive=True,
        )  # fmt: skip
        return redis.asyncio.Redis.from_pool(pool)
    if not settings.url.startswith("unix"):
        options["socket_keepalive"] = True
    try:
        return redis.asyncio.Redis.from_url(settings.url, **options)
    except ValueError:  # its text may hold a part of the password
        forms = f"redis://host:6379/0, rediss://host:6379/0, unix:///path/redis.sock or {SENTINEL_FORM}"
        raise ConfigError(f"redis.url: expected {forms}") from None


def _options(timeout_s: float | None, connect_timeout_s: float) -> dict[str, Any]:
    """What holds for every connection: a limit on each wait, and no repetition behind our back."""
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
