"""Which slabs of an arena are taken: runs of neighbouring slabs, first fit, freed runs joined with their neighbours."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple


class Run(NamedTuple):
    """`length` neighbouring slabs from `first` on."""

    first: int
    length: int

    @property
    def end(self) -> int:
        """The first slab behind the run."""
        return self.first + self.length


class SlabMap:
    """The free runs of `num_slabs` slabs, by position; no two of them touch."""

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self.num_free = num_slabs
        self._free = [Run(0, num_slabs)]

    def take(self, count: int) -> Run | None:
        """The lowest run of `count` slabs, or None where no gap is long enough.

        Lowest first keeps the same memory in use: what was written last is in the processor's cache and is written next.
        """
        for position, gap in enumerate(self._free):
            if gap.length >= count:
                rest = Run(gap.first + count, gap.length - count)
                self._free[position : position + 1] = [rest] if rest.length else []
                self.num_free -= count
                return Run(gap.first, count)
        return None

    def give_back(self, run: Run) -> None:
        """Free a run that `take` gave. Raises `ValueError` where any of it is free already or was never there."""
        position = bisect_left(self._free, run)
        lower, upper = self._free[:position], self._free[position:]
        if run.first < 0 or run.length < 1 or run.end > self.num_slabs:
            raise ValueError(f"{run} lies outside of {self.num_slabs} slabs")
        if (lower and lower[-1].end > run.first) or (upper and upper[0].first < run.end):
            raise ValueError(f"{run} is free already, in whole or in part")
        self.num_free += run.length
        if lower and lower[-1].end == run.first:
            run = Run(lower[-1].first, lower.pop().length + run.length)
        if upper and upper[0].first == run.end:
            run = Run(run.first, run.length + upper.pop(0).length)
        self._free = [*lower, run, *upper]
