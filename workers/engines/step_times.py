"""How long an engine's steps take."""

from __future__ import annotations

OF_NEW = 0.1  # what a step moves the average by


class StepTimes:
    """Steps so far, the seconds that the engine was busy with them, and the moving average of one. What lies between two steps is idleness
    and counts for nothing."""

    def __init__(self) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.average_ms = 0.0

    def add(self, took_s: float) -> None:
        """One step more."""
        took_ms = took_s * 1000
        self.average_ms += (OF_NEW if self.steps else 1.0) * (took_ms - self.average_ms)
        self.busy_s += took_s
        self.steps += 1
