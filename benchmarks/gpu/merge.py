"""All configurations that were measured in one JSON, one table and, where matplotlib is there, one figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = (
    "configuration", "chat + long /s", "chat TTFT p50 / p99", "chat ITL p50 / p99 / max", "long TTFT p50 / p99", "tokens/s",
    "good by TPOT (by p99 of ITLs)",
)  # fmt: skip


def merge(source: Path, target: Path) -> None:
    """Read `source`/*.json; write `target`.json and `target`.png, and print the table."""
    runs = [json.loads(path.read_text()) for path in sorted(source.glob("*.json"))]
    if not runs:
        raise SystemExit(f"no results in {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    rows = [row for run in runs for row in table_rows(run)]
    print("| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", sep="\n")
    print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n")
    print_handovers(runs)
    try:
        draw(runs, target.with_suffix(".png"))
    except ImportError:
        print("no figure: matplotlib is not installed here (pip install matplotlib, then merge again)")


def table_rows(run: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each rate; times in milliseconds."""
    rows = []
    for rate in run["rates"]:
        chat, long = rate["kinds"].get("chat", {}), rate["kinds"].get("long", {})
        rows.append(
            (
                title(run, rate),
                rate["rate"],
                numbers(chat.get("ttft_ms"), "p50", "p99"),
                numbers(chat.get("itl_ms"), "p50", "p99", "max"),
                numbers(long.get("ttft_ms"), "p50", "p99"),
                f"{rate['tokens_per_s']:,.0f}",
                f"{rate['good_by_tpot']} ({rate['good_by_itl_p99']}) of {rate['requests']}",
            )
        )
    return rows


def title(run: dict[str, Any], rate: dict[str, Any]) -> str:
    """The configuration as a row names it."""
    return run["name"] + (f", local to {rate['max_local']}" if "max_local" in rate else "")


def numbers(spread: dict[str, float] | None, *names: str) -> str:
    """`35 / 235`"""
    return " / ".join(f"{spread[name]:,.1f}" for name in names) if spread else ""


def print_handovers(runs: list[dict[str, Any]]) -> None:
    """Hand-overs alone, where they were measured."""
    for run in runs:
        for row in run["handovers"]:
            facts = {name: value for name, value in row.items() if name not in ("prompt_tokens", "nbytes")}
            print(f"{run['name']}, {row['prompt_tokens']} tokens, {row['nbytes'] / 1e6:,.1f} MB: {facts}")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Tails against the rate: what clients wait for the first token and between tokens. Raises ImportError."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = (("chat", "ttft_ms", "p50"), ("chat", "ttft_ms", "p99"), ("chat", "itl_ms", "p99"), ("chat", "itl_ms", "max"),
              ("long", "ttft_ms", "p50"), ("long", "ttft_ms", "p99"))  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for axis, (kind, name, share) in zip(axes.flat, panels, strict=True):
        for label, rates in lines(runs).items():
            points = [(sum(map(float, r["rate"].split("+"))), r["kinds"][kind][name][share]) for r in rates
                      if r["kinds"].get(kind, {}).get(name)]  # fmt: skip
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=f"{kind}: {name.removesuffix('_ms').upper()} {share}", xlabel="requests a second", ylabel="ms")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}")


def lines(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rates of each configuration."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for rate in run["rates"]:
            found.setdefault(title(run, rate), []).append(rate)
    return found
