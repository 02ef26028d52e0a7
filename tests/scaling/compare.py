"""All rules on the same traces: how many requests were in SLO, and for how many worker-hours."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable

from pipeline.config import AutoscaleSettings, StageScaling
from tests.scaling.rules import MOST, Baton, Celery, Dynamo, Fixed, Keda
from tests.scaling.simulator import Machines, Outcome, Rule, Simulation
from tests.scaling.traces import SHAPES, Trace, make

HOUR_S = 3600.0
FIRST_SEED = 100  # the first ones were looked at while the rule was made
BOUNDS = StageScaling(min_workers=0, max_workers=MOST)
POLICY = AutoscaleSettings(poll_s=5.0, prefill=BOUNDS, decode=BOUNDS)

RULES: dict[str, Callable[[Trace, Machines], Rule]] = {
    "fixed peak": Fixed,
    "Baton": lambda trace, machines: Baton(POLICY),
    "Celery --autoscale": lambda trace, machines: Celery(machines),
    "KEDA, streamLength 5": lambda trace, machines: Keda(5, 5),
    "KEDA, streamLength by stage": lambda trace, machines: Keda(1.5, machines.seats * 0.7),
    "Dynamo load, throughput": lambda trace, machines: Dynamo(machines, "throughput"),
    "Dynamo load, latency": lambda trace, machines: Dynamo(machines, "latency"),
}


def compare(seeds: int, length_s: float, machines: Machines, processes: int = 1) -> dict[str, dict[str, Outcome]]:
    """Outcomes by shape and rule, summed over the seeds."""
    cases = [(shape, seed) for shape in SHAPES for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
    table = {shape: {rule: Outcome() for rule in RULES} for shape in SHAPES}
    with multiprocessing.Pool(processes) as pool:
        for (shape, _), outcomes in zip(
            cases, pool.imap(functools.partial(_case, length_s, machines), cases), strict=True
        ):
            for rule, outcome in outcomes.items():
                table[shape][rule].add(outcome)
    return table


def _case(length_s: float, machines: Machines, case: tuple[str, int]) -> dict[str, Outcome]:
    trace = make(*case, length_s)
    return {name: Simulation(trace, rule(trace, machines), machines).run() for name, rule in RULES.items()}


def rows(table: dict[str, dict[str, Outcome]]) -> list[str]:
    """The table as Markdown: per shape, share in SLO and worker-hours beside those of fixed peak provisioning; all shapes last."""
    lines = [
        "| rule | " + " | ".join([*table, "all"]) + " |",
        "|---|" + "---|" * (len(table) + 1),
    ]
    for rule in RULES:
        total, peak = Outcome(), Outcome()
        cells = []
        for outcomes in table.values():
            cells.append(_cell(outcomes[rule], outcomes["fixed peak"]))
            total.add(outcomes[rule])
            peak.add(outcomes["fixed peak"])
        lines.append(f"| {rule} | " + " | ".join([*cells, _cell(total, peak)]) + " |")
    return lines


def _cell(outcome: Outcome, peak: Outcome) -> str:
    return f"{outcome.in_slo / max(1, outcome.requests):.1%} · {outcome.worker_s / peak.worker_s:.0%}"
