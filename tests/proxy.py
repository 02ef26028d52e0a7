"""A proxy between one process and Redis that knows which script each call runs, and can do harm exactly there.

A `Trap` waits for the n-th call of a script and catches it in one of two windows:

    process ──> call ──> [before] ──> Redis runs it ──> answer ──> [reply] ──> process

There it cuts the line, or holds the call (or its answer) back until the test has done to the process what it wants to:

    async with RedisProxy(redis_socket, folder) as proxy:
        trap = proxy.arm(Trap("handover", "reply", holds=True))
        await trap.hit.wait()
        worker.kill()  # the hand-over is done, and its worker never heard of it
        trap.cut()

Commands are read one by one, so a call in the middle of a pipeline is caught alone: what came before it is answered first, what
comes after it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import hiredis

from pipeline.connection import Script

Side = Literal["before", "reply"]
Arguments = Sequence[bytes]  # of the script: what follows the pool's prefix
Wants = Callable[[Arguments, Any], bool]

HOLD_LIMIT_S = 60.0  # a test that forgot its trap ends
CHUNK_BYTES = 1 << 18


@functools.cache
def script_shas() -> dict[str, str]:
    """The name of every script that a process may call, by the digest that names it in EVALSHA."""
    files = (resources.files("pipeline") / "scripts").iterdir()
    names = sorted(file.name.removesuffix(".lua") for file in files if file.name.endswith(".lua"))
    return {hashlib.sha1(Script(n).source.encode()).hexdigest(): n for n in names if not n.startswith("_")}


class Trap:
    """Catches one call. May be armed in several proxies: the first call that fits is caught, the others pass.

    `script` None: any. `wants` looks at the arguments and, on the reply side, at the answer (None before the call).
    """

    def __init__(
        self, script: str | None, side: Side, *, nth: int = 1, holds: bool = False, wants: Wants | None = None
    ) -> None:
        self.script, self.side, self.holds = script, side, holds
        self.hit = asyncio.Event()
        self.arguments: Arguments = ()
        self.caught_by: RedisProxy | None = None
        self._left = nth
        self._wants = wants
        self._is_cut: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def catches(self, proxy: RedisProxy, script: str, arguments: Arguments, answer: Any = None) -> bool:
        """Whether this is the call that was waited for."""
        if self.hit.is_set() or self.script not in (None, script) or isinstance(answer, Exception):
            return False  # an error is no answer of the script: NOSCRIPT
        if self._wants is not None and not self._wants(arguments, answer):
            return False
        self._left -= 1
        if self._left > 0:
            return False
        self.arguments, self.caught_by = arguments, proxy
        self.hit.set()
        return True

    def release(self) -> None:
        """Let what is held go on its way."""
        self._decide(is_cut=False)

    def cut(self) -> None:
        """Close the line instead."""
        self._decide(is_cut=True)

    def _decide(self, *, is_cut: bool) -> None:
        if not self._is_cut.done():
            self._is_cut.set_result(is_cut)

    async def spring(self) -> None:
        """Of a proxy: hold or cut. Raises `_Cut`."""
        if self.holds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_LIMIT_S):
                    await asyncio.shield(self._is_cut)
        if not self.holds or (self._is_cut.done() and self._is_cut.result()):
            raise _Cut


class _Cut(Exception):
    """This connection ends here."""


class RedisProxy:
    """Listens on a unix socket of its own and passes everything on, but for what its traps catch."""

    def __init__(self, redis_socket: str | Path, folder: Path) -> None:
        self.redis_socket = str(redis_socket)
        self._path = folder / f"{uuid.uuid4().hex[:8]}.sock"
        self._server: asyncio.Server | None = None
        self._lines: dict[_Line, asyncio.Task[None]] = {}
        self._traps: list[Trap] = []

    @property
    def url(self) -> str:
        """Where the process connects."""
        return f"unix://{self._path}"

    async def __aenter__(self) -> RedisProxy:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._lines.values()):
            task.cancel()
        await asyncio.gather(*self._lines.values(), return_exceptions=True)

    def arm(self, trap: Trap) -> Trap:
        """Wait for a call; returns the trap. One that has caught something needs no disarming."""
        self._traps = [other for other in self._traps if not other.hit.is_set()]
        self._traps.append(trap)
        return trap

    def disarm(self, trap: Trap) -> None:
        """Stop waiting; what it holds goes on."""
        if trap in self._traps:
            self._traps.remove(trap)
        trap.release()

    def traps(self, side: Side, script: str) -> list[Trap]:
        """Traps that this call may spring."""
        return [trap for trap in self._traps if trap.side == side and trap.script in (None, script)]

    def cut_subscriptions(self) -> int:
        """Cut every connection that listens to channels, as a middlebox does; returns how many there were."""
        listening = [task for line, task in self._lines.items() if line.is_subscription]
        for task in listening:
            task.cancel()
        return len(listening)

    def silence_subscriptions(self) -> int:
        """Nothing passes any more on the connections that listen to channels now, and nothing closes them; returns how many."""
        listening = [line for line in self._lines if line.is_subscription]
        for line in listening:
            line.is_silent = True
        return len(listening)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        line = _Line(self, reader, writer)
        self._lines[line] = task
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await line.run()
        finally:
            self._lines.pop(line, None)


class _Line:
    """One connection of the process, with its own to Redis."""

    def __init__(self, proxy: RedisProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.is_subscription = False
        self.is_silent = False
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._unanswered = 0
        self._quiet = asyncio.Event()  # every command has its answer
        self._quiet.set()
        self._watched: tuple[list[Trap], str, Arguments] | None = None  # the call whose answer may be caught

    async def run(self) -> None:
        """Until one of the two sides closes or a trap cuts."""
        pipes: list[asyncio.Task[None]] = []
        ends = [self._writer]
        try:
            self._up_reader, self._up = await asyncio.open_unix_connection(self._proxy.redis_socket)
            ends.append(self._up)
            pipes += (asyncio.create_task(self._forward()), asyncio.create_task(self._back()))
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pipe in pipes:
                pipe.cancel()
            for end in ends:  # before anything is waited for: this may be cancelled twice
                end.close()
            ended = await asyncio.gather(*pipes, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception) and not isinstance(error, (_Cut, OSError)):
                    raise error  # a mistake of this proxy

    async def _forward(self) -> None:
        commands = hiredis.Reader()
        while data := await self._reader.read(CHUNK_BYTES):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                await self._pass(command)
            await self._up.drain()

    async def _pass(self, command: list[bytes]) -> None:
        if self.is_silent:
            return
        word = command[0].upper()
        script = script_shas().get(command[1].decode(), "") if word == b"EVALSHA" else ""
        self.is_subscription |= word == b"SUBSCRIBE"
        if script:
            arguments = command[4:]
            for trap in self._proxy.traps("before", script):
                if trap.catches(self._proxy, script, arguments):
                    await trap.spring()
            if traps := self._proxy.traps("reply", script):
                await self._pass_watched(command, traps, script, arguments)
                return
        self._send(command)

    async def _pass_watched(self, command: list[bytes], traps: list[Trap], script: str, arguments: Arguments) -> None:
        """Alone on the line, so that what comes back is its answer."""
        await self._quiet.wait()
        self._watched = traps, script, arguments
        self._send(command)
        await self._up.drain()
        await self._quiet.wait()

    def _send(self, command: Iterable[bytes]) -> None:
        self._unanswered += 1
        self._quiet.clear()
        self._up.write(hiredis.pack_command(tuple(command)))

    async def _back(self) -> None:
        answers = hiredis.Reader()
        caught = b""
        while data := await self._up_reader.read(CHUNK_BYTES):
            if self.is_silent:
                continue
            if self._watched is None:
                self._writer.write(data)
            else:
                caught += data
            if not self.is_subscription:
                answers.feed(data)
                while (answer := answers.gets()) is not False:
                    if self._watched is not None:
                        await self._judge(answer)
                        self._writer.write(caught)
                        caught = b""
                    self._answered()
            await self._writer.drain()

    async def _judge(self, answer: Any) -> None:
        assert self._watched is not None
        traps, script, arguments = self._watched
        self._watched = None
        for trap in traps:
            if trap.catches(self._proxy, script, arguments, answer):
                await trap.spring()

    def _answered(self) -> None:
        self._unanswered -= 1
        if self._unanswered <= 0:
            self._quiet.set()
