"""What is left behind when nobody asks any more: in Redis, in the logs, in the memory of the API."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from pipeline.keys import BATCHES_ROOT, FILES_ROOT, TABLE
from pipeline.queue import ENDED_STATES
from tests.system import System

# Keys that stay while a pool is there, by the table of keys, who is alive, files that nobody deleted, and batches and
# their jobs, which nobody runs.
LASTING = (
    "alive:",
    FILES_ROOT,
    BATCHES_ROOT,
    "rq:",
    *(spec.template.partition("{")[0] for spec in TABLE.values() if spec.life.startswith("kept")),
)


async def left_in_redis(system: System) -> list[str]:
    """What a pool at rest should not hold; what has a time to live goes by itself."""
    left = [f"{name}: {value}" for name, value in (await system.at_rest()).items()]
    command = system.connection.command
    keys = [key.decode() for key in await command("KEYS", "*")]
    lives = await system.connection.commands(*[("PTTL", key) for key in keys]) if keys else []
    for key, life_ms in zip(keys, lives, strict=True):
        name = key.removeprefix(system.keys.root)
        if life_ms == -1 and not name.startswith(LASTING):
            left.append(f"{key}: for ever")
    admitted = await system.counter("admitted")
    ended = sum([await system.counter(f"ended:{state}") for state in ENDED_STATES])
    if admitted != ended:
        left.append(f"{admitted} requests were admitted, and {ended} ended")
    return left


def exceptions_in(folder: Path) -> list[str]:
    """Tracebacks in the logs of all processes."""
    found: list[str] = []
    for path in sorted(folder.glob("*.log")):
        for match in re.finditer(r"Traceback \(most recent call last\)", text := path.read_text(errors="replace")):
            found.append(f"{path.name}: {text[max(0, match.start() - 300) : match.start() + 3000]}")
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    return int(psutil.Process(pid).memory_info().rss)
