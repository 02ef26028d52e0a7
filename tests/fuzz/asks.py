"""What is asked: a request as bytes, where it comes from, and how its client behaves."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy

Check = Callable[[httpx.Response], None]

ANSWER, LEAVE, HURRY, TEAR = "wait for the answer", "leave within it", "leave before it", "tear their body"


@dataclasses.dataclass(slots=True)
class Ask:
    """One request. `path`: as the page has it, empty where the page has none; `check`: what is to hold of the answer beyond the page.
    `leave_after`: seconds, of a client that leaves."""

    source: str
    method: str
    path: str
    target: str
    headers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    body: bytes = b""
    check: Check | None = None
    manner: str = ANSWER
    leave_after: float = 0.0

    def header(self, name: str) -> str:
        """The value of a header; empty where there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name.encode()), "")

    def __str__(self) -> str:
        headers = " ".join("-H " + shlex.quote((key + b": " + value).decode("latin-1")) for key, value in self.headers)
        body = f" --data-raw {shlex.quote(self.body[:1500].decode('utf-8', 'backslashreplace'))}" if self.body else ""
        return f"[{self.source}, {self.manner}] curl -X {self.method} {headers}{body} URL{self.target}"


def drawn(strategy: SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """Up to so many values of a strategy, by a seed."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    try:
        collect()
    except Unsatisfiable:  # nothing can be wrong with this operation
        return []
    return found
