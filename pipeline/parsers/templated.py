"""Answers as the model was taught to write them, read by its response template (`transformers.utils.chat_parsing`).

A template names regions of the text: `content`, `thinking` (or `reasoning`, `reasoning_content`), `tool_calls`. Text of the first two is
given out as it comes. A call is given out when its region is complete; one that cannot be read is content as it stands, because a client
can do something with text and nothing with an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.content_parsers import process_field
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from pipeline.errors import ConfigError
from pipeline.parsing import Part, PartKind

REASONING_FIELDS = frozenset(["thinking", "reasoning", "reasoning_content"])
DELIMITERS = ("open", "open_pattern", "close", "close_pattern")
CONTENT_FIELD, CALLS_FIELD = "content", "tool_calls"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # all that reading foreign text raises


class ResponseFormat:
    """A model's response template, compiled once and shared by all answers.

    The library's parser fails where a region cannot be read, with its state in between. So it only finds the regions here (each is text
    to it), and a region is read when it is complete. Raises ConfigError for what is no template. `delimiters`: texts that separate regions,
    for those who must see them.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        try:
            self.whole: ResponseTemplate = load_response_template(dict(spec))
            regions = {name: _as_region(field, self.whole.fields[name]) for name, field in spec["fields"].items()}
            self.regions = _template(spec, regions)
            texts = {name: field for name, field in regions.items() if name != CALLS_FIELD}
            self.text_regions = _template(spec, texts) if texts else None
        except MALFORMED as error:
            raise ConfigError(f"no response template: {error}") from error
        self.has_reasoning = bool(REASONING_FIELDS & self.whole.fields.keys())
        self.has_calls = CALLS_FIELD in self.whole.fields
        patterns = [field[key] for field in spec["fields"].values() for key in DELIMITERS if key in field]
        flat = [one for pattern in patterns for one in (pattern if isinstance(pattern, list) else [pattern])]
        self.delimiters = [text.replace("\\", "") for text in flat]

    def holds_anchor(self, text: str) -> bool:
        """Whether the start of the assistant's message is in this end of a prompt."""
        return self.whole.start_anchor_re.search(text) is not None


def _template(spec: Mapping[str, Any], fields: Mapping[str, Any]) -> ResponseTemplate:
    return load_response_template({**spec, "defaults": {}, "fields": dict(fields)})


def _as_region(field: Mapping[str, Any], compiled: ResponseTemplateField) -> dict[str, Any]:
    """The same delimiters around plain text; what the delimiters capture is kept."""
    groups = {name for pattern in (compiled.open_re, compiled.close_re) if pattern for name in pattern.groupindex}
    kept = {key: field[key] for key in DELIMITERS if key in field}
    transform = {"transform": {name: f"{{{name}}}" for name in groups}} if groups else {}
    return {**kept, "content": "text", "repeats": True, **transform}


class TemplatedParser:
    """Reads one answer. `prefix`: the end of the prompt from the start of the assistant's message on (a template may have opened a region
    there). `tools`: those that the answer may call; without any, a call is content."""

    def __init__(self, form: ResponseFormat, prefix: str, tools: Sequence[dict[str, Any]], *, reasons: bool) -> None:
        self._form = form
        self._parser = ResponseParser(form.regions if tools else form.text_regions or form.regions, prefix=prefix)
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._shows_reasoning = reasons
        self._body: list[str] = []
        self._calls = 0

    @property
    def is_torn(self) -> bool:
        """Never: a call is given out when it is complete."""
        return False

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""
        return self._parts(self._parser.feed(text)) if text else []

    def finish(self) -> list[Part]:
        """What was held back, and a call whose region the end closes."""
        return self._parts(self._parser.finalize()[1])

    def _parts(self, events: Sequence[Mapping[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            field = event["field"]
            match event["type"]:
                case "region_open":
                    self._body = []
                case "region_chunk" if field == CALLS_FIELD:
                    self._body.append(event["text"])
                case "region_chunk":
                    parts += self._text(field, event["text"])
                case "region_close" if field == CALLS_FIELD:
                    parts += self._read("".join(self._body), event["value"])
        return _joined(parts)

    def _text(self, field: str, text: str) -> list[Part]:
        if field in REASONING_FIELDS:
            return [Part(PartKind.REASONING, text)] if self._shows_reasoning else []
        return [Part(PartKind.CONTENT, text)] if field == CONTENT_FIELD else []

    def _read(self, body: str, captures: Any) -> list[Part]:
        """The calls of a region that is complete, or its text."""
        try:
            field = self._form.whole.fields[CALLS_FIELD]
            value = process_field(body, field, captures if isinstance(captures, dict) else {})
            calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
        except MALFORMED:
            return [Part(PartKind.CONTENT, body)]
        if any(name not in self._schemas for name, _ in calls):
            return [Part(PartKind.CONTENT, body)]
        parts = []
        for name, arguments in calls:
            said = json.dumps(_typed(arguments, self._schemas[name]), ensure_ascii=False)
            parts += [Part(PartKind.CALL, name, self._calls), Part(PartKind.ARGUMENTS, said, self._calls)]
            self._calls += 1
        return parts


def _call(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments, however deep the template puts them. Raises what reading foreign text raises."""
    function = value.get("function", value)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    name = function["name"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    return name, arguments


def _typed(arguments: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Formats in the manner of XML know no types: what comes as text and is none by the schema is read as JSON."""
    properties = schema.get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {name: _typed_value(value, known.get(name)) for name, value in arguments.items()}


def _typed_value(value: Any, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if not isinstance(value, str) or kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring texts of one kind as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.kind is part.kind and part.kind in (PartKind.CONTENT, PartKind.REASONING):
            joined[-1] = Part(part.kind, last.text + part.text)
        else:
            joined.append(part)
    return joined
