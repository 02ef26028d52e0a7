"""What a decision leaves for the next one: a value that goes in and comes out."""

from __future__ import annotations

import dataclasses

from pipeline.scaling.forecast import History


@dataclasses.dataclass(frozen=True, slots=True)
class StageMemory:
    """Of one stage. `needs`: (when, workers) of the looks within `autoscale.down_after_s`, without those that a later one was not below."""

    desired: int | None = None  # None: nothing was decided yet
    breaches: int = 0  # looks in a row that asked for more
    direction: int = 0  # of the last change: 1 up, -1 down
    changed_ms: int | None = None
    turned_ms: int | None = None  # when the direction changed
    calm_since_ms: int | None = None  # looks without a gap since
    needs: tuple[tuple[int, int], ...] = ()

    def looked(self, need: int, now_ms: int, window_ms: float) -> StageMemory:
        """This memory after a look that needs so many workers."""
        kept = tuple((at_ms, old) for at_ms, old in self.needs if old > need and at_ms > now_ms - window_ms)
        since_ms = now_ms if self.calm_since_ms is None else self.calm_since_ms
        return dataclasses.replace(self, needs=(*kept, (now_ms, need)), calm_since_ms=since_ms)

    def interrupted(self) -> StageMemory:
        """This memory after a time of which nothing is known: calm is seen anew."""
        return dataclasses.replace(self, calm_since_ms=None)

    def changed(self, desired: int, now_ms: int) -> StageMemory:
        """This memory after a change of the number of workers."""
        direction = 1 if desired > (self.desired or 0) else -1
        has_turned = self.direction not in (0, direction)
        return dataclasses.replace(
            self, desired=desired, breaches=0, direction=direction, changed_ms=now_ms,
            turned_ms=now_ms if has_turned else self.turned_ms,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Of a pool."""

    seen_ms: int | None = None
    busy_ms: int | None = None  # when last anything came, waited or ran
    arrivals: History = ()
    prefill: StageMemory = StageMemory()
    decode: StageMemory = StageMemory()

    def stage(self, name: str) -> StageMemory:
        """The memory of a stage by its name."""
        return self.prefill if name == "prefill" else self.decode
