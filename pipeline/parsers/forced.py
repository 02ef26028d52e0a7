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


# keywords of a schema whose values are no schemas, and those with a schema for each name
_DATA = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def calls_schema(tools: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """JSON of one call or more of these tools.

    Arguments are in `$defs`: references in them need a path without indices of arrays, which some engines do not follow.
    """
    places = [f"#/$defs/{index}" for index in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": place}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    arguments = {str(index): _moved(arguments_schema(tool), places[index]) for index, tool in enumerate(tools)}
    most = {} if parallel else {"maxItems": 1}
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"$defs": arguments, "type": "array", "minItems": 1, **most, "items": items}


def arguments_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a tool: an object, whatever its definition says or leaves out."""
    return {**(tool["function"].get("parameters") or {}), "type": "object"}


def _moved(schema: Any, place: str) -> Any:
    """A schema that was a whole document, with its references as they are where it is a part of another one, at `place`."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # which what refers to it starts from
        return schema
    moved: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[keyword] = place + value[1:]
        elif keyword in _NAMED and isinstance(value, dict):
            moved[keyword] = {name: _moved(item, place) for name, item in value.items()}
        else:
            moved[keyword] = value if keyword in _DATA else _moved(value, place)
    return moved


class JsonObject:
    """How far the JSON of an object has come. `depth`: of braces."""

    def __init__(self) -> None:
        self.depth = 0
        self._has_begun = False
        self._is_in_string = False
        self._is_escaped = False

    @property
    def is_over(self) -> bool:
        """Whether all of it has come."""
        return self._has_begun and self.depth == 0

    def step(self, char: str) -> None:
        """One character more."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_in_string:
            self._is_escaped, self._is_in_string = char == "\\", char != '"'
        elif char == '"':
            self._is_in_string = True
        elif char in "{}":
            self._has_begun = True
            self.depth += 1 if char == "{" else -1


class NamedCall:
    """All text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._arguments = JsonObject()
        self._is_open = False

    @property
    def is_torn(self) -> bool:
        """Whether the arguments have begun and are not over."""
        return self._is_open and not self._arguments.is_over

    def push(self, text: str) -> list[Part]:
        """The text, behind the call's opening."""
        if not text:
            return []
        for char in text:
            self._arguments.step(char)
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
        self._arguments: JsonObject | None = None  # those that are being read; None: between calls

    @property
    def is_torn(self) -> bool:
        """Whether the arguments of the last call have begun and are not over."""
        return self._arguments is not None

    def push(self, text: str) -> list[Part]:
        """What is certain: a call as soon as its name is, its arguments as they come."""
        self._rest += text
        parts: list[Part] = []
        while self._rest and (
            self._open_call(parts) if self._arguments is None else self._read(parts, self._arguments)
        ):
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
        self._arguments = JsonObject()
        return True

    def _read(self, parts: list[Part], arguments: JsonObject) -> bool:
        """Give out the arguments as far as they have come; False where they are not over."""
        for at, char in enumerate(self._rest, start=1):
            arguments.step(char)
            if arguments.is_over:
                parts.append(Part(PartKind.ARGUMENTS, self._rest[:at], self._calls))
                self._rest, self._arguments = self._rest[at:], None
                self._calls += 1
                return True
        parts.append(Part(PartKind.ARGUMENTS, self._rest, self._calls))
        self._rest = ""
        return False
