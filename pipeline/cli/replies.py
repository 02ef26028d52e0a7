"""Answers as Celery's users know them: `->  w1: OK`, what was said below it, `1 node online.`; or JSON for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pipeline.control import Answer

NOBODY = "Error: No nodes replied within time constraint"


def as_text(answers: Mapping[str, Answer]) -> str:
    """Each answer with its body."""
    return "\n".join(_one(name, answer) for name, answer in answers.items())


def as_json(answers: Mapping[str, Answer]) -> str:
    """One object by node; a bare word is `{"ok": word}`, a refusal `{"error": why}`."""
    return json.dumps({name: _plain(answer) for name, answer in answers.items()})


def online(count: int) -> str:
    """The line under the answers of workers."""
    return f"{count} {'node' if count == 1 else 'nodes'} online."


def status_line(name: str, answer: Answer) -> str:
    """`->  w1: OK`, and what is unusual about it."""
    state = answer.value.get("state", "working") if isinstance(answer.value, dict) else "working"
    return f"->  {name}: OK" + (f", {state}" if state != "working" else "")


def _one(name: str, answer: Answer) -> str:
    if answer.error:
        return f"->  {name}: ERROR\n{textwrap.indent(answer.error, ' ' * 8)}"
    body = _body(answer.value)
    return f"->  {name}: OK" + (f"\n{body}" if body else "")


def _body(value: Any) -> str:
    if isinstance(value, str):
        return textwrap.indent(value, " " * 8)
    if isinstance(value, list):
        rows = [f"* {row if isinstance(row, str) else json.dumps(row)}" for row in value]
        return textwrap.indent("\n".join(rows or ["- empty -"]), " " * 4)
    return textwrap.indent(json.dumps(value, indent=4), " " * 4)


def _plain(answer: Answer) -> Any:
    if answer.error:
        return {"error": answer.error}
    return {"ok": answer.value} if isinstance(answer.value, str) else answer.value
