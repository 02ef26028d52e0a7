"""The children of `baton up`, started and stopped in a program of their own, so that what it says as it ends is seen."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, os, sys
from pipeline.cli.children import Child, Terminal

async def main():
    terminal = Terminal(["child"])
    child = Child("child", lambda: ["/bin/sh", "-c", sys.argv[1]], os.environ, terminal)
    await child.start()
    while child.is_running:
        await asyncio.sleep(0.01)
    await child.stop(grace_s=5)
    terminal.line("child", "stopped")

asyncio.run(main())
"""


def test_nothing_is_said_after_the_last_line_where_somebody_keeps_the_pipe_open() -> None:
    """A child that is stopped has ended before its pipe has, if what it started holds that."""
    command = [sys.executable, "-c", PROGRAM, "sleep 5 & echo its last line"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=25)
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["child | its last line", "child | stopped"]
