"""Scale-downs under load: workers are let go while clients ask, and nothing is lost, doubled or counted wrongly.

1. Some shapes of requests are answered once undisturbed; the mock engine's tokens are a function of the request, so every later answer must
   be the same.
2. Clients ask in a closed loop. Meanwhile the levels of prefill and decode go up and down as the seed says; each time that a stage gets
   fewer is a scale-down, and the next one comes when its workers have gone.
3. After each, the counters are compared with what the streams say, in one script, so that nothing moves between the two.
4. At rest nothing is left, and every request that was accepted has ended well.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.cli.children import LogFiles
from pipeline.cli.gpus import Gpus
from pipeline.cli.supervisor import PoolSupervisor
from pipeline.cli.worker_processes import WorkerProcesses
from pipeline.client import PoolClient
from pipeline.config import AutoscaleSettings
from pipeline.connection import Connection
from pipeline.events import Event, listen
from pipeline.scaling.memory import Memory
from pipeline.scaling.places import Phase
from pipeline.scaling.policy import Decision, StageDecision
from pipeline.scaling.signals import PoolSignals
from pipeline.snapshot import text_pairs
from tests.system import POOL, System, collect, request

SETTINGS = (
    "autoscale.poll_s=0.1", "worker.lease_s=2", "worker.drain_s=1.5", "worker.sweep_s=0.25", "worker.max_attempts=50",
    "engine.mock.prefill_base_ms=10", "engine.mock.decode_base_ms=15", "transfer.arena_bytes=33554432", "log.level=info",
)  # fmt: skip
CLIENTS = 8
MOST = {"prefill": 2, "decode": 3}
STEP_LIMIT_S = 60.0
REST_LIMIT_S = 30.0

RECOUNT = """
local root, found = KEYS[1], {}
local function add(field, by) found[field] = (found[field] or 0) + by end
for _, key in ipairs(redis.call('KEYS', root .. 'q:*')) do
  local stage, lane = string.match(string.sub(key, #root + 1), '^q:([^:]+):(.+)$')
  for _, row in ipairs(redis.call('XRANGE', key, '-', '+')) do
    local e = {}
    for i = 1, #row[2], 2 do e[row[2][i]] = row[2][i + 1] end
    local h = redis.call('HMGET', root .. 'req:' .. (e.id or ''), 'state', 'priority', 'n', 'stage', 'lane', 'entry')
    if h[4] == stage and h[5] == lane and h[6] == row[1] then
      if h[1] == 'queued' then
        add('waiting:' .. stage .. ':' .. lane, 1)
        add('tokens:' .. stage .. ':' .. lane, tonumber(e.tokens))
      elseif h[1] == 'running' then
        add('running:' .. stage .. ':' .. h[2], stage == 'decode' and tonumber(h[3]) or 1)
      end
    end
  end
end
local wrong = {}
local counters = redis.call('HGETALL', root .. 'counters')
for i = 1, #counters, 2 do
  local name, value = counters[i], tonumber(counters[i + 1])
  local kind = string.match(name, '^(%a+):')
  if kind == 'waiting' or kind == 'tokens' or kind == 'running' then
    if value ~= (found[name] or 0) then wrong[#wrong + 1] = name .. ' is ' .. value .. ', not ' .. (found[name] or 0) end
    found[name] = nil
  end
end
for name, value in pairs(found) do wrong[#wrong + 1] = name .. ' is 0, not ' .. value end
return wrong
"""


@dataclasses.dataclass
class Levels:
    """A rule that gives what it is told; in the place of `decide`."""

    wanted: dict[str, int]
    given: dict[str, int] = dataclasses.field(default_factory=lambda: {"prefill": 0, "decode": 0})

    def __call__(self, signals: PoolSignals, policy: AutoscaleSettings, memory: Memory, now_ms: int) -> Decision:
        steps = {name: StageDecision(self.given[name], self.wanted[name], "the seed says so") for name in self.wanted}
        self.given = dict(self.wanted)
        return Decision(steps["prefill"], steps["decode"], memory)


@dataclasses.dataclass
class Report:
    """What a run found. `wrong`: sentences; none is right."""

    downs: int = 0
    gone: int = 0  # workers
    asked: int = 0
    handed_back: int = 0  # tasks that were given to another worker, not finished
    recomputed: int = 0  # requests whose blocks were computed again
    recounts: int = 0
    seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)


async def run(redis_url: str, folder: Path, downs: int, seed: int, say: Callable[[str], None]) -> Report:
    """One run on an empty Redis."""
    report = Report()
    began_s = time.monotonic()
    async with System(redis_url, *SETTINGS, log_dir=folder) as system:
        async with supervised(system, folder, report) as (supervisor, levels), system.client() as client:
            await settled(system, supervisor, levels)
            answers = await undisturbed(client, random.Random(f"{seed} shapes"))
            say(f"{len(answers)} shapes are answered undisturbed, {downs} scale-downs begin")
            load = Load(client, answers, report)
            counting = asyncio.create_task(count_handed_back(await listen(system.connection, [POOL]), report))
            asking = [asyncio.create_task(load.ask(random.Random(f"{seed} client {n}"))) for n in range(CLIENTS)]
            try:
                await go_up_and_down(system, supervisor, levels, random.Random(f"{seed} levels"), downs, report, say)
            finally:
                load.is_over = True
                await asyncio.gather(*asking)
                counting.cancel()
            await check_rest(system, report)
            levels.wanted = {"prefill": 0, "decode": 0}
            await settled(system, supervisor, levels)
        left = {stage: names for stage in MOST if (names := await system.alive(stage))}
        report.wrong += [f"still listed: {left}"] if left else []
    report.seconds = time.monotonic() - began_s
    return report


async def count_handed_back(events: AsyncIterator[tuple[str, Event]], report: Report) -> None:
    async for _, event in events:
        report.handed_back += event.type == "task-retried"


@contextlib.asynccontextmanager
async def supervised(system: System, folder: Path, report: Report, gpus: str = "") -> Any:
    """A supervisor of the pool in this process, whose rule is the levels."""
    levels = Levels({"prefill": 1, "decode": 2})
    connection = Connection(system.settings.redis)

    def say(line: str) -> None:
        report.gone += line.endswith(" has gone")
        if " while it left" in line or "its place is empty" in line:
            report.wrong.append(line)

    def module(*words: str) -> list[str]:
        sets = [word for override in system.overrides for word in ("--set", override)]
        return [sys.executable, "-m", *words, *sets]

    @contextlib.asynccontextmanager
    async def connected() -> Any:
        yield connection

    processes = WorkerProcesses(
        module, connected, LogFiles(folder), say, max_attempts=50, batches=system.settings.batches
    )
    supervisor = PoolSupervisor(
        POOL, system.settings.autoscale, connection, processes, Gpus(gpus.split()), say,
        drain_s=system.settings.worker.drain_s, lease_s=system.settings.worker.lease_s, rule=levels,
    )  # fmt: skip
    await supervisor.take()
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, levels
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await supervisor.drain()
        await connection.close()


async def undisturbed(client: PoolClient, rng: random.Random) -> list[tuple[dict[str, Any], list[list[int]]]]:
    """Shapes of requests and the answers that they always have: some end before a worker has to go, some do not."""
    answers = []
    for number in range(10):
        shape = {
            "prompt": [3 + (number * 7 + i) % 500 for i in range(rng.choice([20, 200, 900]))],
            "max_tokens": rng.choice([5, 30, 80, 200]),
            "n": rng.choice([1, 1, 2]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
        }
        tokens, ended = await collect(await client.submit(request(**shape)), shape["n"])
        assert ended.state == "done", ended
        answers.append((shape, tokens))
    return answers


class Load:
    """Clients that ask until it is over, and look at each answer."""

    def __init__(
        self, client: PoolClient, answers: list[tuple[dict[str, Any], list[list[int]]]], report: Report
    ) -> None:
        self._client, self._answers, self._report = client, answers, report
        self.is_over = False

    async def ask(self, rng: random.Random) -> None:
        """One client."""
        while not self.is_over:
            shape, expected = rng.choice(self._answers)
            stream = await self._client.submit(request(**shape))
            self._report.asked += 1
            try:
                async with asyncio.timeout(60):
                    tokens, ended = await collect(stream, shape["n"])  # asserts that nothing comes twice
            except (AssertionError, TimeoutError) as error:
                self._report.wrong.append(f"{stream.id}: {type(error).__name__} {error}")
                continue
            if ended.state != "done":
                self._report.wrong.append(f"{stream.id}: {ended.state} {ended.reason}")
            elif tokens != expected:
                self._report.wrong.append(f"{stream.id}: other tokens than undisturbed")


async def go_up_and_down(
    system: System, supervisor: PoolSupervisor, levels: Levels, rng: random.Random, downs: int, report: Report,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    for wanted in drawn(rng):
        fewer = [stage for stage in MOST if wanted[stage] < levels.wanted[stage]]
        levels.wanted = wanted
        await settled(system, supervisor, levels)
        report.downs += len(fewer)
        report.recounts += 1
        report.wrong += [
            line.decode() for line in await system.connection.command("EVAL", RECOUNT, 1, system.keys.root)
        ]
        if fewer and report.downs % 10 == 0:
            say(f"{report.downs} scale-downs, {report.asked} requests, {len(report.wrong)} wrong")
        if report.downs >= downs or report.wrong:
            return


def drawn(rng: random.Random) -> Iterator[dict[str, int]]:
    """Levels without end: all the way up, and down in one or two steps, to one or to none."""
    while True:
        yield dict(MOST)
        yield {"prefill": rng.choice([0, 1]), "decode": rng.choice([1, 2])}
        yield {"prefill": rng.choice([0, 1]), "decode": rng.choice([0, 1])}


async def settled(system: System, supervisor: PoolSupervisor, levels: Levels) -> None:
    """As many as are wanted work, none starts, none leaves, and the levels were seen."""

    def holds() -> bool:
        phases = supervisor.phases()
        return levels.given == levels.wanted and all(
            len(phases[stage]) == count and set(phases[stage]) <= {Phase.WORKING}
            for stage, count in levels.wanted.items()
        )

    await system.until(holds, STEP_LIMIT_S)


async def check_rest(system: System, report: Report) -> None:
    """Nothing is under way, so nothing is held."""
    with contextlib.suppress(TimeoutError):
        await system.until(system.rests, REST_LIMIT_S)
    report.wrong += [f"left over: {what} {value}" for what, value in (await system.at_rest()).items()]
    report.wrong += [line.decode() for line in await system.connection.command("EVAL", RECOUNT, 1, system.keys.root)]
    counters = collections.Counter(
        {
            name: int(value)
            for name, value in text_pairs(await system.connection.command("HGETALL", system.keys.counters())).items()
        }
    )
    ended = sum(value for name, value in counters.items() if name.startswith("ended:"))
    if counters["admitted"] != ended or counters["ended:done"] != ended:
        report.wrong.append(f"{counters['admitted']} admitted, {ended} ended, {counters['ended:done']} of them done")
    report.recomputed = sum(value for name, value in counters.items() if name.startswith("kv_recomputed:"))
