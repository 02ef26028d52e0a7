"""Answers in a form: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`, as the pipeline's `GuidedDecoding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pipeline.errors import InvalidRequest
from pipeline.protocol import UNREADABLE, GuidedDecoding

ANY_OBJECT = '{"type":"object"}'

Pattern = Annotated[str, Meta(min_length=1)]
Alternatives = Annotated[list[str], Meta(min_length=1)]
Schema = dict[str, Any] | Pattern  # as an object, or as its JSON


class TextFormat(msgspec.Struct, tag="text", tag_field="type"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, tag="json_object", tag_field="type"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct):
    """`response_format.json_schema`; whatever `strict` says, the answer follows the schema."""

    schema: dict[str, Any]
    name: str | None = None


class JsonSchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type"):
    """JSON by a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct):
    """vLLM's `structured_outputs`."""

    json: Schema | None = None
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None


def guided_decoding(fields: Mapping[str, Any]) -> tuple[str, GuidedDecoding] | None:
    """The constraint of a body and the field that asks for it; `fields` are those of `CONSTRAINING`. Raises InvalidRequest for two."""
    asked = [(name, one) for name, value in fields.items() if value is not None for one in _constraints(name, value)]
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(dict.fromkeys(name for name, _ in asked))
        raise InvalidRequest(f"one constraint a request: {names} ask for {len(asked)}", param=asked[1][0])
    return asked[0]


def _constraints(name: str, value: Any) -> list[GuidedDecoding]:
    match value:
        case TextFormat():
            return []
        case JsonObjectFormat():
            return [GuidedDecoding(json=ANY_OBJECT)]
        case JsonSchemaFormat():
            return [GuidedDecoding(json=_json(name, value.json_schema.schema))]
        case StructuredOutputs():
            given = {key: getattr(value, key) for key in ("json", "regex", "choice", "grammar")}
            found = [_constraint(name, key, one) for key, one in given.items() if one is not None]
            return found + ([GuidedDecoding(json=ANY_OBJECT)] if value.json_object else [])
    return [_constraint(name, name.removeprefix("guided_"), value)]


def _constraint(name: str, kind: str, value: Any) -> GuidedDecoding:
    fields: dict[str, Any] = {kind: _json(name, value) if kind == "json" else value}
    return GuidedDecoding(**fields)


def _json(name: str, schema: dict[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return msgspec.json.encode(schema).decode()
    try:
        msgspec.json.decode(schema, type=dict[str, Any])
    except UNREADABLE as error:
        raise InvalidRequest(f"{name}: a schema as text is a JSON object: {error}", param=name) from error
    return schema
