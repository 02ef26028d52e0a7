"""The outcome of a run as one table, and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from typing import Any

from tests.chaos.invariants import ALLOWED, KINDS, Findings
from tests.chaos.journal import OUTCOMES, Journal

SHOWN = 12  # broken things of a kind that are printed


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that is said about a run."""

    seed: int
    seconds: float
    engine: str
    clients: int
    power_cuts: bool
    wall_s: float
    outcomes: dict[str, int]
    faults: dict[str, int]
    hits: dict[str, int]
    recoveries: int
    recovery_s: dict[str, float]
    allowed: dict[str, int]
    broken: dict[str, list[str]]

    @property
    def missing(self) -> list[str]:
        """Windows that were never hit."""
        return [name for name, hits in self.hits.items() if not hits]

    @property
    def is_good(self) -> bool:
        """Whether every invariant holds and every window was hit."""
        return not any(self.broken.values()) and not self.missing

    @property
    def again(self) -> str:
        """The command that runs it again."""
        return (
            f"python -m tests.chaos --seconds {self.seconds:g} --seed {self.seed} --engine {self.engine} "
            f"--clients {self.clients}{'' if self.power_cuts else ' --no-power-cuts'}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return dataclasses.asdict(self) | {"missing": self.missing, "is_good": self.is_good, "again": self.again}

    def table(self) -> str:
        """In Markdown."""
        rows = [
            ("requests", f"{sum(self.outcomes.values())}: {_listed(self.outcomes)}"),
            ("faults", f"{sum(self.faults.values())}: {_listed(self.faults)}"),
            (
                "windows hit",
                f"{len(self.hits) - len(self.missing)} of {len(self.hits)}, {sum(self.hits.values())} times",
            ),
            ("recoveries", str(self.recoveries)),
            ("recovery time", ", ".join(f"{name} {value:.2f} s" for name, value in self.recovery_s.items())),
            *((kind, str(len(self.broken[kind]))) for kind in KINDS),
            *((f"allowed: {what}", str(self.allowed.get(what, 0))) for what in ALLOWED),
        ]
        head = f"{self.engine} engine, {self.clients} clients, {self.seconds:g} s, seed {self.seed}"
        lines = [f"| chaos | {head} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        lines += ["", "| window | hits |", "|---|---|", *(f"| {name} | {hits} |" for name, hits in self.hits.items())]
        return "\n".join(lines)

    def complaints(self) -> str:
        """What is broken, in sentences."""
        lines = [f"never hit: {name}" for name in self.missing]
        for kind, texts in self.broken.items():
            lines += [f"{kind}: {text}" for text in texts[:SHOWN]]
            lines += [f"{kind}: ... and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
        return "\n".join(lines)


def make_report(
    journal: Journal, findings: Findings, *, faults: dict[str, int], hits: dict[str, int], **settings: Any
) -> Report:
    """Put it together."""
    counted = collections.Counter(record.outcome or "unfinished" for record in journal.records)
    outcomes = {outcome: counted[outcome] for outcome in (*OUTCOMES, *sorted(counted.keys() - set(OUTCOMES)))}
    return Report(
        outcomes=outcomes, faults=faults, hits=hits, recoveries=len(journal.recoveries_s),
        recovery_s=_percentiles(journal.recoveries_s), allowed=dict(findings.allowed), broken=findings.broken, **settings,
    )  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": 0.0, "p99": 0.0, "max": max(values, default=0.0)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts.items() if value) or "none"
