"""The children of `baton up`, started and stopped in a program of their own, so that what it says as it ends is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.children import LogFiles

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


TALKING = """
import asyncio, os, sys
from pipeline.cli.children import Child, Terminal

async def main():
    terminal = Terminal(["child"])
    child = Child("child", lambda: ["/bin/sh", "-c", "for n in $(seq 2000); do echo $n \\u2192; done"], os.environ, terminal)
    await child.start()
    code = await child.ended()
    for n in range(3):
        terminal.line("child", "stopped")
    terminal.write("at last")
    await child.stop(grace_s=5)
    print("over", code, file=sys.stderr, flush=True)
    os._exit(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("place", ["a pipe that nobody reads", "a full disk", "a terminal of few letters"])
def test_a_terminal_that_is_gone_ends_nothing(place: str) -> None:
    if place == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    elif place == "a terminal of few letters":
        out = os.open(os.devnull, os.O_WRONLY)
    else:
        reading, out = os.pipe()
        os.close(reading)
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(
        [sys.executable, "-c", TALKING], stdout=out, stderr=subprocess.PIPE, text=True, timeout=25, env=environment
    )
    os.close(out)
    assert result.stderr == "over 0\n"


def test_a_disk_that_is_full_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "child.log").symlink_to("/dev/full")
    logs = LogFiles(tmp_path)
    logs.line("child", "lost")
    (tmp_path / "child.log").unlink()
    logs.line("child", "kept")
    assert (tmp_path / "child.log").read_text() == "kept\n"
