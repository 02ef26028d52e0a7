"""The windows that a run must hit: every script from both sides, and every step of a request's life.

A **cut** loses the line before a call reaches Redis, or before its answer reaches the process; whichever process calls next is
caught. A **step** catches one member at one step of a request's life and does something to it, exactly there: kills it, kills or
stops its engine, or freezes it for longer than its lease, so that what it was about to say comes late, from a worker that does
not own the request any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx

from pipeline.protocol import Log
from pipeline.queue import Admission, LaneLook, Limits
from pipeline.waiting import wait_at_most
from tests.chaos.fleet import LEASE_S, SHOWS_KEY, Fleet, Member
from tests.chaos.journal import Journal
from tests.proxy import Side, Trap, Wants, script_shas
from tests.system import POOL, request

# of requests that are not the load's: what a cut line or a power cut leaves of them is over before rest is asked for
LIMITS = Limits(max_waiting_tasks=10**6, max_waiting_tokens=10**9, deadline_s=15, result_ttl_s=7200)

VISIT_S = 6.0  # a window that nobody came by in this time is tried again later
PROVOKE_AFTER_S = 0.3
FROZEN_S = 1.6 * LEASE_S


def _has_answer(_: Sequence[bytes], answer: Any) -> bool:
    return bool(answer)


def _finishes(arguments: Sequence[bytes], _: Any) -> bool:
    return any(arguments[7::7])  # the finish reason of one of its items


def _is_from_worker(arguments: Sequence[bytes], _: Any) -> bool:
    return arguments[3] != b""


def _is_from_outside(arguments: Sequence[bytes], _: Any) -> bool:
    return arguments[3] == b""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The line is cut at a call of a script, whoever makes it."""

    script: str
    side: Side

    @property
    def name(self) -> str:
        """In the report."""
        return f"{self.script}: line cut before {'the call' if self.side == 'before' else 'its answer'}"


OF_OPERATORS = {"put_key", "lead", "desire"}  # of the command line alone: no member of the fleet calls them
# Of files and batches, which the load has none of: what cut lines do to them is in tests/contract, and tests/batches/chaos.py kills all
# that take part in one.
OF_BATCHES = {
    "put_file", "drop_file", "put_batch", "take_batch", "hold_batch", "turn_batch", "free_batch", "put_part",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A member of a role is caught at a call of a script, and `act` is done to it."""

    step: str
    role: str
    script: str
    side: Side
    act: str
    wants: Wants | None = None
    provokes: str = ""  # of `PROVOKERS`, where it is not the script's own

    @property
    def name(self) -> str:
        """In the report."""
        return f"{self.step}: {self.act}"


KILL, FREEZE, KILL_ENGINE, STOP_ENGINE = "killed", "frozen past its lease", "engine killed", "engine stopped"

STEPS = (
    Step("prefill claimed", "prefill", "claim", "reply", KILL, _has_answer),
    Step("prefill computing", "prefill", "claim", "reply", KILL_ENGINE, _has_answer),
    Step("prefill computing", "prefill", "claim", "reply", STOP_ENGINE, _has_answer),
    Step("blocks published", "prefill", "handover", "before", KILL),
    Step("blocks published", "prefill", "handover", "before", FREEZE),
    Step("handed over", "prefill", "handover", "reply", KILL),
    Step("decode claimed", "decode", "claim", "reply", KILL, _has_answer),
    Step("decode claimed", "decode", "claim", "reply", FREEZE, _has_answer),
    Step("in transfer", "decode", "claim", "reply", KILL_ENGINE, _has_answer),
    Step("in transfer", "decode", "claim", "reply", STOP_ENGINE, _has_answer),
    Step("blocks fetched", "decode", "fetched", "before", KILL),
    Step("blocks fetched", "decode", "fetched", "before", FREEZE),
    Step("fetch said", "decode", "fetched", "reply", KILL),
    Step("mid stream, step computed", "decode", "step", "before", KILL),
    Step("mid stream, step computed", "decode", "step", "before", FREEZE),
    Step("mid stream, step logged", "decode", "step", "reply", KILL),
    Step("mid stream", "decode", "step", "reply", KILL_ENGINE),
    Step("mid stream", "decode", "step", "reply", STOP_ENGINE),
    Step("last token computed", "decode", "step", "before", KILL, _finishes),
    Step("last token logged", "decode", "step", "reply", KILL, _finishes),
    Step("end to be said", "decode", "end", "before", KILL, _is_from_worker),
    Step("end to be said", "decode", "end", "before", FREEZE, _is_from_worker),
    Step("end said", "decode", "end", "reply", KILL, _is_from_worker),
    Step("API admits", "api", "admit", "before", KILL),
    Step("API has admitted", "api", "admit", "reply", KILL),
    Step("API reads a log", "api", "attach", "before", KILL),
    Step("API has read a log", "api", "attach", "reply", KILL),
    Step("API cancels", "api", "end", "before", KILL, _is_from_outside, "cancel"),
    Step("API has cancelled", "api", "end", "reply", KILL, _is_from_outside, "cancel"),
)


def cuts() -> list[Cut]:
    """Every script of a request's life from both sides: a new script is in it as soon as it is a file."""
    scripts = sorted(set(script_shas().values()) - OF_OPERATORS - OF_BATCHES)
    return [Cut(script, side) for script in scripts for side in ("before", "reply")]


# What makes somebody call a script that is rarely called, by its name (or that of a step's `provokes`). A script that is not here is
# called often enough by itself.
Provoke = Callable[[Fleet], Awaitable[None]]


async def _cut_subscriptions(fleet: Fleet) -> None:
    """Whoever subscribes anew reads the logs of its streams."""
    for proxy in (fleet.driver, *(member.proxy for member in fleet.of("api"))):
        proxy.cut_subscriptions()


async def _drain_a_worker(fleet: Fleet) -> None:
    fleet.drain(await fleet.whole("prefill", "decode"))


async def _drain_a_decode_worker(fleet: Fleet) -> None:
    """What it cannot finish within `worker.drain_s` it hands back."""
    fleet.drain(await fleet.whole("decode"))


async def _kill_a_worker_and_say_so(fleet: Fleet) -> None:
    fleet.kill(await fleet.whole("prefill", "decode"), is_told=True)


async def _hold_up_decode(fleet: Fleet) -> None:
    """While nobody decodes, handles wait for somebody to fetch them, and their owners ask for whom."""
    members = [member for member in fleet.of("decode") if member.is_whole]
    await asyncio.gather(*(fleet.freeze(member, "both", LEASE_S / 2) for member in members))


async def _leave_early(fleet: Fleet, **headers: str) -> None:
    """Clients that leave: their requests are cancelled."""
    body = {"model": POOL, "prompt": [7] * 30, "max_tokens": 200, "stream": True}
    async with httpx.AsyncClient(trust_env=False, timeout=VISIT_S, headers=SHOWS_KEY) as http:
        for member in fleet.of("api"):
            with contextlib.suppress(httpx.HTTPError):
                async with http.stream("POST", f"{member.url}/v1/completions", json=body, headers=headers) as answer:
                    await anext(answer.aiter_bytes())


async def _leave_for_a_while(fleet: Fleet) -> None:
    """Clients that leave and may come back."""
    await _leave_early(fleet, **{"X-Baton-Linger": "0.5"})


async def _lose_a_log(fleet: Fleet) -> None:
    """A request whose record and log are gone, as after a fail-over: who serves it brings both back."""
    item = request(20, max_tokens=30)
    admission = Admission(item, "prefill", "default", "driver")
    await fleet.queue.restore(admission, LIMITS, Log(tokens=[[]], finished=[None]))


async def _ask_how_it_stands(fleet: Fleet) -> None:
    """Who waits for the result of a request that nobody streams."""
    item = request(20, max_tokens=3)
    await fleet.queue.admit(Admission(item, "prefill", "default", "", notify="driver"), LIMITS)
    await fleet.queue.standing([item.id], with_results=True)


async def _purge(fleet: Fleet) -> None:
    """A request that would wait a while; where a power cut takes the purge back, it runs then."""
    await fleet.queue.admit(Admission(request(20), "decode", "low", "driver", priority="low", delay_s=10), LIMITS)
    await fleet.queue.purge("decode", "low", cursor="-", last="+", nonce=uuid.uuid4().hex)


async def _bury_and_drop(fleet: Fleet) -> None:
    """A request that no engine can serve fails; one that has died is forgotten by hand."""
    item = request(20)
    await fleet.queue.admit(Admission(item, "bury", "default", "driver"), LIMITS)
    delivery = await fleet.queue.claim(
        "bury", "driver", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=0
    )
    if delivery is not None:
        await fleet.queue.hand_back(delivery, "driver", counts=True, max_attempts=0, why="chaos")
        await fleet.queue.drop(item.id, "0-0")


async def _keep_a_prompt(fleet: Fleet) -> None:
    """Somebody who asks for the log probabilities of a prompt."""
    item = request(20)
    await fleet.queue.admit(Admission(item, "score", "default", "driver"), LIMITS)
    delivery = await fleet.queue.claim(
        "score", "driver", [LaneLook("default", 9)], total_blocks=9, block_size=16, overtake_ms=0
    )
    if delivery is not None:
        await fleet.queue.keep_prompt("driver", delivery.id, delivery.epoch, bytes(100))
        await fleet.queue.end(delivery.id, "cancelled", "chaos", worker="driver", epoch=delivery.epoch)


async def _forget(fleet: Fleet) -> None:
    """A request that has ended and whose client wants nothing of it kept."""
    item = request(20)
    await fleet.queue.admit(Admission(item, "decode", "low", "driver", priority="low", delay_s=10), LIMITS)
    await fleet.queue.cancel(item.id, "chaos")
    await fleet.queue.erase(item.id)


PROVOKERS: dict[str, Provoke] = {
    "attach": _cut_subscriptions,
    "leave": _drain_a_worker,
    "handback": _drain_a_decode_worker,
    "evict": _kill_a_worker_and_say_so,
    "wanted": _hold_up_decode,
    "cancel": _leave_early,
    "linger": _leave_for_a_while,
    "restore": _lose_a_log,
    "standing": _ask_how_it_stands,
    "purge": _purge,
    "drop": _bury_and_drop,
    "prompt": _keep_a_prompt,
    "erase": _forget,
}


W = TypeVar("W", Cut, Step)


class Visitor:
    """Goes round all windows, those with the fewest hits first, in seeded order."""

    def __init__(self, fleet: Fleet, journal: Journal, rng: random.Random) -> None:
        self._fleet, self._journal, self._rng = fleet, journal, rng
        self.hits: dict[str, int] = {window.name: 0 for window in (*cuts(), *STEPS)}
        self._visits: dict[str, int] = dict(self.hits)

    @property
    def missing(self) -> list[str]:
        """Windows that were never hit."""
        return [name for name, hits in self.hits.items() if not hits]

    async def visit_cuts(self, pause_s: float) -> None:
        """Until cancelled."""
        while True:
            await self._visit_cut(self._next(cuts()))
            await asyncio.sleep(self._rng.uniform(0, 2 * pause_s))

    async def visit_steps(self, role: str, pause_s: float) -> None:
        """Those where members of a role are caught, until cancelled; what goes on behind a visit ends before this returns."""
        steps = [step for step in STEPS if step.role == role]
        async with asyncio.TaskGroup() as aftermath:
            while True:
                if self._round(steps) <= self._round(STEPS):  # no role is a round ahead of the others
                    await self._visit_step(self._next(steps), aftermath)
                await asyncio.sleep(self._rng.uniform(0.1, 0.1 + 2 * pause_s))

    def _round(self, windows: Sequence[Step]) -> int:
        return min(self.hits[window.name] for window in windows)

    def _next(self, windows: Sequence[W]) -> W:
        return min(windows, key=lambda window: (self.hits[window.name], self._visits[window.name], self._rng.random()))

    async def _visit_cut(self, window: Cut) -> None:
        self._visits[window.name] += 1
        wants = _has_answer if (window.script, window.side) == ("claim", "reply") else None
        nth = 1 if window.script in PROVOKERS else self._rng.choice((1, 1, 2, 3))
        trap = self._fleet.arm_everywhere(Trap(window.script, window.side, nth=nth, wants=wants))
        try:
            if await self._is_hit(trap, window.script):
                self.hits[window.name] += 1
        finally:
            self._fleet.disarm_everywhere(trap)

    async def _visit_step(self, window: Step, aftermath: asyncio.TaskGroup) -> None:
        self._visits[window.name] += 1
        member = await self._fleet.whole(window.role)
        process = member.process
        trap = member.proxy.arm(Trap(window.script, window.side, holds=True, wants=window.wants))
        try:
            is_hit = await self._is_hit(trap, window.provokes or window.script)
            if is_hit and member.is_whole and member.process is process:  # no other fault was quicker
                self.hits[window.name] += 1
                await self._journal.touch(member)
                self._act(window.act, member, trap, aftermath)
            elif is_hit:
                trap.release()
        finally:
            if not trap.hit.is_set():
                member.proxy.disarm(trap)

    async def _is_hit(self, trap: Trap, provoker: str) -> bool:
        """Wait for the call; where it is a rare one, make somebody call."""
        await wait_at_most(trap.hit, PROVOKE_AFTER_S)
        if not trap.hit.is_set() and provoker in PROVOKERS:
            await PROVOKERS[provoker](self._fleet)
        await wait_at_most(trap.hit, VISIT_S)
        return trap.hit.is_set()

    def _act(self, act: str, member: Member, trap: Trap, aftermath: asyncio.TaskGroup) -> None:
        match act:
            case "killed":
                self._fleet.kill(member)
                trap.cut()
            case "engine killed":
                self._fleet.kill_engine(member)
                trap.release()
            case "engine stopped":
                stopped = self._fleet.stop_engine(member)
                aftermath.create_task(self._fleet.let_engine_go(stopped))
                trap.release()
            case "frozen past its lease":
                aftermath.create_task(self._freeze(member, trap))
            case _:
                raise AssertionError(act)

    async def _freeze(self, member: Member, trap: Trap) -> None:
        """Another one has the request when the call goes on, and only then the member wakes up."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fleet.freeze(member, "both", FROZEN_S))
            await asyncio.sleep(FROZEN_S * 0.9)
            trap.release()
