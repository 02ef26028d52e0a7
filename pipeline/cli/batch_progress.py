"""How far a batch is: a bar where somebody looks, a line for each new state where nobody does."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Iterator

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Tell = Callable[[str, "Counts"], None]


class Counts(msgspec.Struct, frozen=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """Those that have an answer."""
        return self.completed + self.failed


@contextlib.contextmanager
def progress(console: Console, batch_id: str) -> Iterator[Tell]:
    """Gives what is told of a state and of counts as they grow."""
    if not console.is_terminal:
        yield _lines(console, batch_id)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"))
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=None, more="")
        pace = Pace()

        def tell(state: str, counts: Counts) -> None:
            more = figures(counts, pace.per_s(counts.done, time.monotonic()))
            bars.update(bar, description=state, total=counts.total or None, completed=counts.done, more=more)

        yield tell


def figures(counts: Counts, rate: float) -> str:
    """`3 failed, 72.5/s, 0:00:07 left`, without what is not known. Counts grow by hundreds at once, so the rate is that of all the time."""
    said = [f"{counts.failed} failed"] if counts.failed else []
    if rate and counts.done < counts.total:
        left = datetime.timedelta(seconds=math.ceil((counts.total - counts.done) / rate))
        said += [f"{rate:.1f}/s", f"{left} left"]
    elif rate:
        said.append(f"{rate:.1f}/s")
    return ", ".join(said)


class Pace:
    """Requests a second since the first look."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def per_s(self, done: int, now_s: float) -> float:
        """0 as long as it is not known."""
        if self._first is None:
            self._first = done, now_s
        first, first_s = self._first
        return (done - first) / (now_s - first_s) if now_s > first_s else 0.0


def _lines(console: Console, batch_id: str) -> Tell:
    said = ""

    def tell(state: str, counts: Counts) -> None:
        nonlocal said
        if state != said:
            said = state
            console.print(f"{batch_id}: {state}, {counts.done} of {counts.total} requests", markup=False)

    return tell
