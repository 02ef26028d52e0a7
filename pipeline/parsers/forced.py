"""Calls that a grammar made the model write, as JSON of our own making: for any model, whatever format it learned for its tools.

    required    [{"name": "f", "arguments": {...}}, ...]
    by name     {...}                                       the arguments alone

The arguments are given out as they come. `calls_schema` and `arguments_schema` are what the grammar is made of; properties come in the
order of the schema, so the name is known before its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.parsing import Part, PartKind

_HEAD = re.compile(r'\s*\}?\s*[\[,]\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


def calls_schema(tools: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """JSON of one call or more of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": arguments_schema(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": calls[0] if len(calls) == 1 else {"anyOf": calls}}


def arguments_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a tool: an object, whatever its definition says or leaves out."""
    return {**(tool["function"].get("parameters") or {}), "type": "object"}


class NamedCall:
    """All text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_open = False

    def push(self, text: str) -> list[Part]:
        """The text, behind the call's opening."""
        if not text:
            return []
        opening = [] if self._is_open else [Part(PartKind.CALL, self._name)]
        self._is_open = True
        return [*opening, Part(PartKind.ARGUMENTS, text)]

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


class RequiredCalls:
    """Finds the calls in the list."""

    def __init__(self) -> None:
        self._rest = ""
        self._calls = 0
        self._depth = 0  # of braces in the arguments that are being read; 0: between calls
        self._is_in_string = False
        self._is_escaped = False

    def push(self, text: str) -> list[Part]:
        """What is certain: a call as soon as its name is, its arguments as they come."""
        self._rest += text
        parts: list[Part] = []
        while self._rest and (self._read_arguments(parts) if self._depth else self._open_call(parts)):
            pass
        return parts

    def finish(self) -> list[Part]:
        """An answer that ended too early ends in the middle of a call."""
        return []

    def _open_call(self, parts: list[Part]) -> bool:
        found = _HEAD.match(self._rest)
        if found is None:
            return False
        parts.append(Part(PartKind.CALL, msgspec.json.decode(found["name"]), self._calls))
        self._rest = self._rest[found.end() :]
        return self._read_arguments(parts)

    def _read_arguments(self, parts: list[Part]) -> bool:
        """Give out the arguments as far as they have come; False where they are not over."""
        for at, char in enumerate(self._rest, start=1):
            self._step(char)
            if self._depth == 0:
                parts.append(Part(PartKind.ARGUMENTS, self._rest[:at], self._calls))
                self._rest = self._rest[at:]
                self._calls += 1
                return True
        parts.append(Part(PartKind.ARGUMENTS, self._rest, self._calls))
        self._rest = ""
        return False

    def _step(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_in_string:
            self._is_escaped, self._is_in_string = char == "\\", char != '"'
        elif char == '"':
            self._is_in_string = True
        else:
            self._depth += {"{": 1, "}": -1}.get(char, 0)
