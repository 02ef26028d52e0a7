"""GPUs that both stages share: who gets how many when both together want more than there are."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config import AutoscaleSettings
from pipeline.queue import STAGES


def shares(needs: Mapping[str, int], policy: AutoscaleSettings) -> dict[str, int]:
    """Workers of each stage that fit the budget: the minima, then one at a time to the stage whose need is met least.

    A stage that needs more never gets fewer, whatever the other one needs.
    """
    given = {name: min(needs[name], policy.stage(name).min_workers) for name in STAGES}
    if not policy.gpu_budget or gpus(needs, policy) <= policy.gpu_budget:
        return dict(needs)
    free = policy.gpu_budget - gpus(given, policy)
    while open_ := [name for name in STAGES if given[name] < needs[name] and policy.stage(name).gpus <= free]:
        name = min(open_, key=lambda stage: (given[stage] / needs[stage], stage != "decode"))  # decode can do both
        given[name] += 1
        free -= policy.stage(name).gpus
    return given


def gpus(workers: Mapping[str, int], policy: AutoscaleSettings) -> int:
    """GPUs that so many workers take."""
    return sum(count * policy.stage(name).gpus for name, count in workers.items())
