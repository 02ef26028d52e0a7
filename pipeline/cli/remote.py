"""`baton status`, and the actions of `baton inspect` and `baton control` that workers answer themselves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.options import Given
from pipeline.cli.pools import Place, connected
from pipeline.cli.replies import NOBODY, as_json, as_text, online, status_line
from pipeline.control import Answer, ControlClient, Replies
from pipeline.exits import Exit


class Whom(NamedTuple):
    """Whom to ask and how long to wait; `to` names workers, as they are or as `name@pool`; empty: all."""

    pool: str | None
    to: Sequence[str]
    timeout_s: float


class Told(NamedTuple):
    """The answers by node, sorted, and whether all those that were named gave one."""

    answers: dict[str, Answer]
    is_complete: bool


async def ask_status(source: Given, whom: Whom, *, json: bool) -> Exit:
    """One line a worker that lives and answers."""
    told = await _ask(source, whom, "status")
    if json:
        print(as_json(told.answers))
    elif told.answers:
        lines = [status_line(name, answer) for name, answer in told.answers.items()]
        print("\n".join([*lines, "", online(len(told.answers))]))
    return _exit_for(told)


async def ask_workers(source: Given, whom: Whom, method: str, *, json: bool, counted: bool) -> Exit:
    """What each worker says; `counted` adds how many are online."""
    told = await _ask(source, whom, method)
    if json:
        print(as_json(told.answers))
    elif told.answers:
        print(as_text(told.answers))
        if counted:
            print(f"\n{online(len(told.answers))}")
    return _exit_for(told)


def _exit_for(told: Told) -> Exit:
    if not told.answers or not told.is_complete:
        return Exit.NO_NODES
    return Exit.FAILED if any(answer.error for answer in told.answers.values()) else Exit.OK


async def _ask(source: Given, whom: Whom, method: str) -> Told:
    """Who was named or is registered and said nothing is told on stderr."""
    async with connected(source, whom.pool) as place:
        replies = await asyncio.gather(*(_ask_pool(place, pool, whom, method) for pool in place.pools))
    answers = {name: answer for found in replies for name, answer in found.answers.items()}
    silent = [name for found in replies for name in found.silent]
    registered = [name for found in replies for name in found.registered]
    missing = missing_lines(whom, list(answers), silent, registered)
    if not answers and not whom.to:
        missing.append(NOBODY)
    if missing:
        print("\n".join(missing), file=sys.stderr)
    return Told(dict(sorted(answers.items())), is_complete=not (whom.to and missing))


def missing_lines(whom: Whom, answered: Sequence[str], silent: Sequence[str], registered: Sequence[str]) -> list[str]:
    """One line for each worker that was named and gave no answer; one for all where nobody was named."""
    if not whom.to:
        return [f"no reply within {whom.timeout_s:g} s from: {', '.join(silent)}"] if silent else []
    there = ", ".join(registered) or "none"
    return [
        f"Error: {name}: no reply within {whom.timeout_s:g} s"
        if _is_among(name, silent)
        else f"Error: {name}: no worker of this name is registered; registered: {there}"
        for name in whom.to
        if not _is_among(name, answered)
    ]


def _is_among(name: str, nodes: Sequence[str]) -> bool:
    """With several pools nodes are shown as `name@pool`, and may be named with or without it; with one pool also with it."""
    return any(name in (node, node.partition("@")[0]) or name.partition("@")[0] == node for node in nodes)


async def _ask_pool(place: Place, pool: str, whom: Whom, method: str) -> Replies:
    """With several pools each worker is shown with the name of its own."""
    suffix = f"@{pool}"
    to = [name.removesuffix(suffix) for name in whom.to]
    replies = await ControlClient(place.connection, pool).ask(method, to=to, timeout_s=whom.timeout_s)
    shown = suffix if len(place.pools) > 1 else ""
    return Replies(
        {f"{name}{shown}": answer for name, answer in replies.answers.items()},
        [f"{name}{shown}" for name in replies.silent],
        [f"{name}{shown}" for name in replies.registered],
    )
