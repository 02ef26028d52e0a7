"""`baton status`, and the actions of `baton inspect` and `baton control` that workers answer themselves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.options import Given
from pipeline.cli.pools import Place, connected
from pipeline.cli.replies import NOBODY, as_json, as_text, online, status_line
from pipeline.control import Answer, ControlClient
from pipeline.exits import Exit


class Whom(NamedTuple):
    """Whom to ask and how long to wait; `to` names workers, as they are or as `name@pool`; empty: all."""

    pool: str | None
    to: Sequence[str]
    timeout_s: float


async def ask_status(source: Given, whom: Whom, *, json: bool) -> Exit:
    """One line a worker that lives and answers."""
    answers = await _ask(source, whom, "status")
    if json:
        print(as_json(answers))
    elif answers:
        lines = [status_line(name, answer) for name, answer in answers.items()]
        print("\n".join([*lines, "", online(len(answers))]))
    return _exit_for(answers)


async def ask_workers(source: Given, whom: Whom, method: str, *, json: bool, counted: bool) -> Exit:
    """What each worker says; `counted` adds how many are online."""
    answers = await _ask(source, whom, method)
    if json:
        print(as_json(answers))
    elif answers:
        print(as_text(answers))
        if counted:
            print(f"\n{online(len(answers))}")
    return _exit_for(answers)


def _exit_for(answers: dict[str, Answer]) -> Exit:
    if not answers:
        print(NOBODY, file=sys.stderr)
        return Exit.NO_NODES
    return Exit.FAILED if any(answer.error for answer in answers.values()) else Exit.OK


async def _ask(source: Given, whom: Whom, method: str) -> dict[str, Answer]:
    """The answers by node, sorted; who is registered and said nothing is named on stderr."""
    async with connected(source, whom.pool) as place:
        replies = await asyncio.gather(*(_ask_pool(place, pool, whom, method) for pool in place.pools))
    silent = [name for _, names in replies for name in names]
    if silent:
        print(f"no reply within {whom.timeout_s:g} s from: {', '.join(silent)}", file=sys.stderr)
    answers = {name: answer for found, _ in replies for name, answer in found.items()}
    return dict(sorted(answers.items()))


async def _ask_pool(place: Place, pool: str, whom: Whom, method: str) -> tuple[dict[str, Answer], list[str]]:
    suffix = f"@{pool}"
    to = [name.removesuffix(suffix) for name in whom.to]
    replies = await ControlClient(place.connection, pool).ask(method, to=to, timeout_s=whom.timeout_s)
    shown = suffix if len(place.pools) > 1 else ""
    return {f"{n}{shown}": answer for n, answer in replies.answers.items()}, [f"{n}{shown}" for n in replies.silent]
