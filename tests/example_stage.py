"""A stage of one's own in twenty lines: `baton worker words --app tests.example_stage`. Below the line: what the tests try.

Called from any process with `pipeline.tasks`:

    async with connect(settings) as client:
        result = await client.task("embed", queue="words").delay("some text", scale=2.0)
        vector = await result.get(timeout=10)
"""

from __future__ import annotations

from workers.stages import Stages, StageTask

stages = Stages()


@stages.task("embed", queue="words", soft_time_limit=5, time_limit=10)
async def embed(task: StageTask, text: str, *, scale: float = 1.0) -> list[float]:
    """A vector for a text: here how often each vowel comes."""
    return [scale * text.count(vowel) for vowel in "aeiou"]


@stages.task("spell", queue="words")
async def spell(task: StageTask, text: str) -> int:
    """Streams the characters of a text as tokens; a delivery after a crash goes on behind what was sent."""
    for character in text[len(task.logged) :]:
        await task.emit([ord(character)])
    return len(task.logged)


@stages.task("rank", queue="words", time_limit=10)
def rank(task: StageTask, texts: list[str]) -> list[str]:
    """Computes in a thread: a plain function may keep a processor busy."""
    return sorted(texts, key=len)


# -- for the tests ----------------------------------------------------------------------------------------------------------

import asyncio  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.errors import SoftTimeLimitExceeded  # noqa: E402
from workers.outcome import Fail, Outcome, Retry  # noqa: E402


def note(path: str, line: object) -> None:
    """Add a line to a file: what ran, in which order."""
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


def count(path: str) -> int:
    """Lines noted so far."""
    return len(Path(path).read_text().splitlines()) if Path(path).exists() else 0


@stages.task("order", queue="words")
async def order(task: StageTask, path: str, name: str) -> None:
    """Notes that it ran."""
    note(path, name)


@stages.task("wait_for", queue="words")
async def wait_for(task: StageTask, path: str, go: str) -> int:
    """Notes its process, then runs until a file is there."""
    note(path, os.getpid())
    try:
        while not Path(go).exists():  # noqa: ASYNC110  # a test gives the sign from another process
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        note(path, "cancelled")
        raise
    return os.getpid()


@stages.task("wait_within", queue="words", soft_time_limit=40, time_limit=50)
async def wait_within(task: StageTask, path: str, go: str) -> int:
    """The same with limits, one call deeper."""
    return await wait_for(task, path, go)


@stages.task("slow_spell", queue="words")
async def slow_spell(task: StageTask, text: str, path: str) -> int:
    """Streams; noted is the process, and where each delivery began."""
    note(path, f"{os.getpid()} {len(task.logged)}")
    for character in text[len(task.logged) :]:
        await task.emit([ord(character)])
        await asyncio.sleep(0.05)
    return len(task.logged)


@stages.task("flaky", queue="words", max_attempts=5)
async def flaky(task: StageTask, path: str, failures: int) -> int:
    """Asks for another try until it has run often enough."""
    note(path, time.monotonic())
    if count(path) <= failures:
        raise task.retry("not yet", countdown=0.5)
    return task.attempts


@stages.task("later", queue="words")
async def later(task: StageTask, path: str) -> Outcome | str:
    """Returns its retry as an outcome, for long."""
    note(path, "ran")
    return Retry("comes back in a minute", countdown=60) if count(path) == 1 else "done"


@stages.task("broken", queue="words", max_attempts=2)
async def broken(task: StageTask, path: str) -> None:
    """Raises what nobody expects."""
    note(path, "ran")
    raise KeyError("no such word")


@stages.task("refuse", queue="words")
async def refuse(task: StageTask) -> Outcome:
    """Fails for good."""
    return Fail("will not do this")


@stages.task("give", queue="words")
async def give(task: StageTask, size: int) -> bytes:
    """A result of a given size."""
    return bytes(size)


@stages.task("strange", queue="words")
async def strange(task: StageTask) -> Any:
    """A result that cannot be stored."""
    return object()


@stages.task("softly", queue="words", soft_time_limit=0.3, time_limit=60)
async def softly(task: StageTask, catches: bool) -> str:
    """Runs into its soft limit, and may make the best of it."""
    try:
        async with asyncio.timeout(50):
            await asyncio.sleep(50)
    except SoftTimeLimitExceeded as limit:
        if not catches:
            raise
        await asyncio.sleep(0.01)  # it may still wait: it was told, not cancelled
        return str(limit)
    return "slept"


@stages.task("hard", queue="words", time_limit=0.3)
async def hard(task: StageTask, path: str) -> None:
    """Is stopped at its hard limit and cleans up."""
    try:
        await asyncio.sleep(50)
    finally:
        note(path, "cleaned up")


@stages.task("stubborn", queue="words", time_limit=0.3)
async def stubborn(task: StageTask, path: str) -> None:
    """Does not end when it is stopped."""
    note(path, os.getpid())
    while True:
        try:
            await asyncio.sleep(50)
        except asyncio.CancelledError:
            note(path, "told")


@stages.task("stubborn_thread", queue="words", time_limit=0.3)
def stubborn_thread(task: StageTask, path: str) -> None:
    """A thread, which nothing can stop."""
    note(path, os.getpid())
    time.sleep(3600)
