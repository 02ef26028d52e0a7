"""One row of a benchmark and how rows are printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A figure beside its reference of the same run, where there is one. What counts is the ratio."""

    name: str
    value: float
    unit: str
    reference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratio = self.value / self.reference if self.reference else None
        return {"name": self.name, "value": self.value, "unit": self.unit, "reference": self.reference, "ratio": ratio}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def print_rows(rows: Iterable[dict[str, Any]], title: str = "") -> None:
    """One table."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("figure")
    for column in ("value", "reference", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        reference, ratio = row["reference"], row["ratio"]
        table.add_row(
            row["name"], f"{row['value']:,.4g} {row['unit']}", f"{reference:,.4g}" if reference else "",
            f"{ratio:.2f}" if ratio else "",
        )  # fmt: skip
    Console(width=120).print(table)
