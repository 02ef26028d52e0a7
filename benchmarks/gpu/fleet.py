"""Processes of a benchmark, each with a log of its own. Leaving ends all of them; a failure shows the end of each log."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from pipeline.processes import bound_command

REPOSITORY = Path(__file__).parents[2]
TAIL_LINES = 30


class Fleet:
    """`with Fleet(logs) as fleet: fleet.spawn(...)`"""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.show_tails()
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + 5
        for process in self._processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what a killed engine leaves behind
            except ProcessLookupError:
                continue

    def spawn(self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `python -m module` from the repository; it dies with this process, and what it started is in its group."""
        command = bound_command([sys.executable, "-m", module, *arguments])
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (self.logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY, process_group=0,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            )  # fmt: skip

    async def until(self, holds: Callable[[], Awaitable[bool]], limit_s: float, what: str) -> None:
        """Wait for a condition. Raises RuntimeError when a process ends, or when it takes too long."""
        until_s = time.monotonic() + limit_s
        while not await holds():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode} before {what}")
            if time.monotonic() > until_s:
                raise RuntimeError(f"{what}: not within {limit_s:g} s")
            await asyncio.sleep(0.1)

    def show_tails(self) -> None:
        """The last lines of each log."""
        for log in sorted(self.logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print(f"--- the end of {log}", *lines, sep="\n", flush=True)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
