"""The processes of one command, such as `baton up`: started bound to this one, their lines printed with their name, started again,
stopped.

A child leads its own session, so Ctrl-C in the terminal reaches this process alone, which stops them in order; the kernel
kills them when this process ends in any other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.text import Text

from pipeline.errors import BatonError
from pipeline.processes import bound_command

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")
_LAST_LINES_S = 1.0  # how long an ended child's pipe may stay open in a process that outlives it


class ChildEnded(BatonError):
    """A child process ended before everything was ready."""

    code = "child_ended"


class Lines(Protocol):
    """Where the lines of processes go. One that cannot be written, on a full disk or a terminal that is gone, is lost and ends nothing."""

    def line(self, name: str, text: str) -> None:
        """Takes a line of a process."""
        ...


class LogFiles:
    """A file for each name, which grows: `prefill-0.log`. Who moves one away finds a new one at the next line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def line(self, name: str, text: str) -> None:
        """Adds a line to the file of a process."""
        with contextlib.suppress(OSError), (self._folder / f"{name}.log").open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


class Terminal:
    """Where all processes print: `name | line`, a colour for each name, one writer so that lines never mix. Names may come later, too."""

    def __init__(self, names: Sequence[str]) -> None:
        self._console = _console()
        self._width = max(len(name) for name in names)
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        self._held: list[tuple[str, str]] | None = None

    def line(self, name: str, text: str) -> None:
        """Prints a line of a process, later if lines are held."""
        if self._held is not None:
            self._held.append((name, text))
            return
        colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
        prefix = (f"{name:<{self._width}} | ", colour)
        self._print(Text.assemble(prefix, Text.from_ansi(text)))

    def write(self, text: str) -> None:
        """Prints a piece of text as it is, without a line end."""
        self._print(Text(text), end="")

    def _print(self, text: Text, *, end: str = "\n") -> None:
        try:
            self._console.print(text, end=end)
        except SystemExit:  # rich's answer to a pipe that nobody reads; it is quiet from now on
            pass
        except (OSError, ValueError):  # full, gone, or of an encoding without it
            # a console prints what failed once more, each time
            self._console = _console()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the processes' lines back while something is streamed; they follow afterwards."""
        self._held = []
        try:
            yield
        finally:
            lines, self._held = self._held, None
            for name, text in lines:
                self.line(name, text)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, file=sys.stdout)


class Child:
    """One process, started any number of times; `command` is asked anew for each start."""

    def __init__(self, name: str, command: Callable[[], list[str]], env: Mapping[str, str], lines: Lines) -> None:
        self.name = name
        self._command = command
        self._env = env
        self._lines = lines
        self._process: asyncio.subprocess.Process | None = None
        self._printing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts it; the call must come from the main thread (see `pipeline.processes`)."""
        self._process = await asyncio.create_subprocess_exec(
            *bound_command(self._command()),
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._printing = asyncio.create_task(self._print_lines(self._process.stdout))

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs, and before it was started."""
        return None if self._process is None else self._process.returncode

    async def ended(self) -> int:
        """Waits until it ends and its last lines are printed; returns its exit code, negative for a signal."""
        assert self._process is not None and self._printing is not None
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_LINES_S):
                await asyncio.shield(self._printing)
        return code

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL to it and all it started when it has not ended within `grace_s`; its last lines are printed."""
        if self._process is None:
            return
        if self.is_running:
            self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.shield(self.ended())
        except TimeoutError:
            self._lines.line(self.name, f"did not end within {grace_s:g} s: killed")
            self.kill()
            await self.ended()
        self._let_go(self._process)

    def _let_go(self, process: asyncio.subprocess.Process) -> None:
        """Close our end of its pipe while the loop runs: a process that outlives it may hold the other one for ever, and what is
        closed after the loop complains."""
        assert self._printing is not None
        self._printing.cancel()
        process._transport.close()  # type: ignore[attr-defined]  # asyncio has no public way

    def kill(self) -> None:
        """SIGKILL to it and all it started."""
        if self.is_running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _print_lines(self, pipe: asyncio.StreamReader) -> None:
        rest = b""
        while data := await pipe.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._lines.line(self.name, line.decode(errors="replace"))
        if rest:
            self._lines.line(self.name, rest.decode(errors="replace"))


class Restarts:
    """How long to wait before a child is started again: doubled each time, from the beginning after a good minute."""

    first_s = 0.5
    longest_s = 30.0
    good_run_s = 60.0

    def __init__(self) -> None:
        self._next_s = self.first_s

    def delay_s(self, ran_s: float) -> float:
        """The pause after a run of `ran_s`."""
        if ran_s >= self.good_run_s:
            self._next_s = self.first_s
        delay_s = self._next_s
        self._next_s = min(delay_s * 2, self.longest_s)
        return delay_s
