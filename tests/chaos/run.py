"""One run, from an empty Redis to the report.

1. A fleet starts, and every shape of request is answered once undisturbed.
2. Under load, tasks do harm: one visits every script from both sides, one a role every step of a request's life, one is weather.
3. It goes on for the time that was asked for, and until every window was hit.
4. Harm ends, then the load; everything comes to rest.
5. The invariants are checked, the fleet leaves in good order, and what it leaves behind is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.client import PoolClient
from tests.chaos import invariants
from tests.chaos.faults import Weather
from tests.chaos.fleet import PLACES, Fleet
from tests.chaos.invariants import Findings
from tests.chaos.journal import Journal
from tests.chaos.load import Load
from tests.chaos.report import Report, make_report
from tests.chaos.shapes import answer_undisturbed, catalogue
from tests.chaos.windows import Visitor

LONGEST_FACTOR, LONGEST_EXTRA_S = 1.5, 120.0  # windows that were not hit by then will not be


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of a run."""

    seconds: float = 60.0
    seed: int = 1
    engine: str = "mock"
    clients: int = 12
    power_cuts: bool = True

    @property
    def longest_s(self) -> float:
        """When it gives up on windows that nobody has come by."""
        return self.seconds * LONGEST_FACTOR + LONGEST_EXTRA_S


async def run(plan: Plan, say: Callable[[str], None]) -> tuple[Report, Path | None]:
    """Returns the report and, where something is broken, the folder with the logs of all processes."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: it holds sockets
    report = None
    try:
        report = await _run_in(folder, plan, say)
        return report, None if report.is_good else folder
    finally:
        if report is not None and report.is_good:
            shutil.rmtree(folder)
        elif report is None:
            say(f"the run broke off; logs are in {folder}/logs")


async def _run_in(folder: Path, plan: Plan, say: Callable[[str], None]) -> Report:
    began_s = time.monotonic()
    findings = Findings()
    async with Fleet(folder, plan.engine, random.Random(f"{plan.seed} fleet")) as fleet:
        async with fleet.client() as client:
            say(f"the fleet serves after {time.monotonic() - began_s:.1f} s")
            journal, visitor, weather = await _disturb(fleet, client, plan, say)
            say("harm and load are over, waiting for rest")
            await invariants.wait_for_rest(fleet)
            await invariants.check_requests(fleet, journal.records, findings)
            await invariants.check_rest(fleet, findings)
        await invariants.check_departure(fleet, findings)
        invariants.check_processes(fleet, findings)
    return make_report(
        journal, findings, faults=dict(weather.counts), hits=visitor.hits, seed=plan.seed, seconds=plan.seconds,
        engine=plan.engine, clients=plan.clients, power_cuts=plan.power_cuts, wall_s=round(time.monotonic() - began_s, 1),
    )  # fmt: skip


async def _disturb(
    fleet: Fleet, client: PoolClient, plan: Plan, say: Callable[[str], None]
) -> tuple[Journal, Visitor, Weather]:
    shapes = catalogue(random.Random(f"{plan.seed} shapes"))
    await answer_undisturbed(shapes, client, fleet.of("api")[0].url)
    say(f"{len(shapes)} shapes are answered undisturbed")
    journal = Journal(fleet)
    visitor = Visitor(fleet, journal, random.Random(f"{plan.seed} windows"))
    weather = Weather(fleet, journal, random.Random(f"{plan.seed} weather"), power_cuts=plan.power_cuts)
    load = Load(fleet, journal, shapes, client, plan.seed)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(plan.clients))
        harm = asyncio.create_task(_do_harm(visitor, weather, plan))
        try:
            await _until_enough(harm, visitor, plan, say)
        finally:
            harm.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await harm
            load.stop()
    return journal, visitor, weather


async def _do_harm(visitor: Visitor, weather: Weather, plan: Plan) -> None:
    pause_s = min(1.0, plan.seconds / 120)
    async with asyncio.TaskGroup() as group:
        group.create_task(visitor.visit_cuts(pause_s))
        for role, _ in PLACES:
            group.create_task(visitor.visit_steps(role, pause_s))
        group.create_task(weather.run(2.0))


async def _until_enough(harm: asyncio.Task[None], visitor: Visitor, plan: Plan, say: Callable[[str], None]) -> None:
    """The time is over and every window was hit, or it is much too late."""
    began_s = time.monotonic()
    said_s = began_s
    while not harm.done():
        now_s = time.monotonic()
        late = now_s - began_s > plan.longest_s
        if late or (now_s - began_s > plan.seconds and not visitor.missing):
            return
        if now_s - said_s > 10:
            said_s = now_s
            few = ": " + "; ".join(visitor.missing) if 0 < len(visitor.missing) < 4 else ""
            say(f"{now_s - began_s:.0f} s: {len(visitor.missing)} windows to hit{few}")
        await asyncio.sleep(0.1)
    await harm
