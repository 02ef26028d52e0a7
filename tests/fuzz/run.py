"""One run: a server with the mock engine, requests by the thousand, and what must be true then."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.redis_server import RedisServer
from tests.fuzz.asks import HURRY, LEAVE, Ask, drawn
from tests.fuzz.audit import exceptions_in, left_in_redis, resident_bytes
from tests.fuzz.load import Clients, Tally
from tests.fuzz.mutations import mutated
from tests.fuzz.page_cases import page_cases
from tests.openapi_page import Page
from tests.serving import serving
from tests.system import POOL

SETTINGS = (f"pools.{POOL}.max_model_len=256", "queue.deadline_s=60", "log.level=info")
BATCH = 500
PAGE_SHARE = 0.4  # of the requests, at most
REST_S = 120.0
MOST_GROWTH = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """`settle`: requests after which memory is compared with that of the end; 0: it is not."""

    requests: int
    seed: int
    clients: int = 16
    settle: int = 2000


@dataclasses.dataclass
class Report:
    """What came of it. `memory`: bytes of the API's process by requests sent."""

    plan: Plan
    tally: Tally
    seconds: float
    memory: dict[int, int]
    left: list[str]
    exceptions: list[str]

    @property
    def growth(self) -> float:
        """Of the API's memory from the end of the first `settle` requests to the last."""
        if self.plan.settle not in self.memory:
            return 0.0
        return self.memory[max(self.memory)] / self.memory[self.plan.settle] - 1

    def complaints(self) -> list[str]:
        """Everything that is wrong; nothing if it is good."""
        grown = [f"the API's memory grew by {self.growth:.1%}"] if self.growth > MOST_GROWTH else []
        return [*self.tally.wrong, *(f"left over: {one}" for one in self.left), *self.exceptions, *grown]

    def rows(self) -> Iterator[tuple[str, str]]:
        """The table."""
        tally = self.tally
        yield "requests", f"{tally.sent} in {self.seconds:.0f} s, {self.plan.clients} clients, seed {self.plan.seed}"
        yield "made by", _counts(tally.sources)
        yield "clients", _counts(tally.manners) + f"; {tally.streams} streams read, {tally.left_streams} left within"
        yield "statuses", _counts(tally.statuses)
        yield "server errors that nobody asked for, answers other than the page says", str(len(tally.wrong))
        yield "hung", str(tally.hung)
        yield "left in Redis", str(len(self.left))
        yield "exceptions in logs", str(len(self.exceptions))
        sizes = ", ".join(f"{size / 2**20:.1f} MiB after {sent}" for sent, size in sorted(self.memory.items()))
        yield "memory of the API", f"{sizes} ({self.growth:+.1%})"


def _counts(counter: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items(), key=lambda item: str(item[0])))


def asks_of(page: dict[str, Any], plan: Plan) -> Iterator[Ask]:
    """Of the page and of mutations in turn, without an end; those that wait for their answer once each."""
    each = max(4, plan.requests // 60)
    of_page = page_cases(page, each, plan.seed)[: int(plan.requests * PAGE_SHARE)]
    share = len(of_page) * BATCH // plan.requests
    pages, seen = iter(of_page), set[str]()
    for batch in itertools.count():
        yield from itertools.islice(pages, share)
        for ask in drawn(mutated(page), BATCH - share, plan.seed * 1000 + batch):
            text = str(ask) + repr(ask.body)
            if text not in seen or ask.manner in (LEAVE, HURRY):  # these go at another moment each time
                seen.add(text)
                yield ask


async def run(plan: Plan, server: RedisServer, logs: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Ask, rest, look."""
    memory: dict[int, int] = {}
    async with serving(server, logs, *SETTINGS) as served, served.http() as http:
        page = (await http.get("/openapi.json")).json()
        began_s = time.monotonic()

        def on_sent(sent: int) -> None:
            if plan.settle and sent % plan.settle == 0:
                memory[sent] = resident_bytes(served.api.pid)
                say(f"{sent} requests, {memory[sent] / 2**20:.1f} MiB, {len(clients.tally.wrong)} complaints")

        clients = Clients(served.url, Page(page), plan.clients, plan.seed, on_sent)
        await clients.send(itertools.islice(asks_of(page, plan), plan.requests))
        seconds = time.monotonic() - began_s
        with contextlib.suppress(TimeoutError):
            await served.system.until(lambda: _rests(served.system), REST_S)
        left = await left_in_redis(served.system)
        memory[clients.tally.sent] = resident_bytes(served.api.pid)
        if served.api.poll() is not None:
            left.append(f"the API ended with {served.api.returncode}")
    return Report(plan, clients.tally, seconds, memory, left, exceptions_in(logs))


async def _rests(system: Any) -> bool:
    return not await left_in_redis(system)
