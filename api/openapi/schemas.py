"""JSON schemas of the page: msgspec's, of the types that check bodies, and the few things that those types cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from pipeline.embeddings import MOST_INPUTS
from pipeline.surface import anthropic_bodies, input_items, messages
from pipeline.surface.bodies import MOST_PROMPTS
from pipeline.surface.input_items import KINDS
from pipeline.surface.responses_bodies import FunctionTool

Schema = dict[str, Any]

REFS = "#/components/schemas/"
UNREAD = (*messages.UNREAD, *input_items.UNREAD, *anthropic_bodies.NOT_READ)  # decoded to be refused by name
PREFIXES = {  # of types whose names others have, too
    "pipeline.surface.anthropic_bodies": "Anthropic",
    "pipeline.surface.responses_bodies": "Response",
    "pipeline.surface.input_items": "Input",
    "pipeline.surface.messages": "Chat",
    "pipeline.surface.bodies": "Chat",
}


def schemas_of(types: Iterable[Any]) -> tuple[dict[Any, Schema], dict[str, Schema]]:
    """The schema of each type, and the components that they refer to by name."""
    wanted = list(dict.fromkeys([*types, *KINDS.values(), FunctionTool]))
    made = msgspec.json.schema_components(wanted, ref_template=REFS + "{name}")
    plain = msgspec.json.decode(
        _renamed(msgspec.json.encode(made).decode()), type=tuple[list[Schema], dict[str, Schema]]
    )
    schemas, components = list(map(_true, plain[0])), {name: _true(schema) for name, schema in plain[1].items()}
    by_type = dict(zip(wanted, schemas, strict=True))
    for struct, fields in _FIELDS.items():
        for field, schema in fields(by_type).items():
            if struct in components:
                kept = components[struct]["properties"][field]
                components[struct]["properties"][field] = _where_told(kept) | schema
    for name, field in _REQUIRED.items():
        components[name]["required"].append(field)
    for kind, struct_type in KINDS.items():
        _name_kind(components[by_type[struct_type]["$ref"].removeprefix(REFS)], kind)
    return by_type, {name: components[name] for name in sorted(components) if name not in _UNREAD_NAMES}


def _renamed(text: str) -> str:
    """msgspec puts the module in front of names that come twice."""
    for module, prefix in PREFIXES.items():
        text = text.replace(f"{REFS}{module}.", REFS + prefix).replace(f'"{module}.', f'"{prefix}')
    return text


def _true(schema: Any) -> Any:
    """Without what is decoded only to be refused, and with the default that holds: null is the same as not given."""
    if isinstance(schema, list):
        return [_true(one) for one in schema if not (isinstance(one, dict) and one.get("$ref") in _UNREAD_REFS)]
    if not isinstance(schema, dict):
        return schema
    made = {name: _true(value) for name, value in schema.items()}
    if isinstance(mapping := made.get("mapping"), dict):
        made["mapping"] = {tag: ref for tag, ref in mapping.items() if ref not in _UNREAD_REFS}
    for one in made.get("anyOf", ()) if "default" in made else ():
        if made["default"] is None and "default" in one:
            made["default"] = one.pop("default")
    if "default" in made and made["default"] is None and "enum" not in made:
        del made["default"]
    return made


def _where_told(schema: Schema) -> Schema:
    return {name: schema[name] for name in ("description", "default") if name in schema}


def _name_kind(schema: Schema, kind: str) -> None:
    """Items of a conversation say their type, but for messages, which need not."""
    is_optional = kind == "message"
    schema["properties"] = {"type": {"enum": [kind, None] if is_optional else [kind]}, **schema["properties"]}
    if not is_optional:
        schema["required"] = ["type", *schema["required"]]


def _sequences(most: int) -> Schema:
    """A text, token ids, or several of one of these: JSON has one type of list, so the type that checks it is wider."""
    text, ids = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    lists = [{"type": "array", "items": one, "minItems": 1, "maxItems": most} for one in (text, ids)]
    return {"anyOf": [text, ids, *lists]}


def _input(by_type: Mapping[Any, Schema]) -> Schema:
    items = {"type": "array", "items": {"anyOf": [by_type[struct] for struct in KINDS.values()]}, "minItems": 1}
    return {"anyOf": [{"type": "string", "minLength": 1}, items | {"maxItems": input_items.MOST_ITEMS}]}


def _function_tools(by_type: Mapping[Any, Schema]) -> Schema:
    said = {"type": "object", "properties": {"type": {"enum": ["function"]}}, "required": ["type"]}
    tools = {"type": "array", "items": {"allOf": [said, by_type[FunctionTool]]}, "maxItems": 128}
    return {"anyOf": [tools, {"type": "null"}]}


_FIELDS: dict[str, Callable[[Mapping[Any, Schema]], dict[str, Schema]]] = {
    "CompletionBody": lambda _: {"prompt": _sequences(MOST_PROMPTS)},
    "EmbeddingBody": lambda _: {"input": _sequences(MOST_INPUTS)},
    "ResponseBody": lambda by_type: {"input": _input(by_type), "tools": _function_tools(by_type)},
    "AnthropicTool": lambda _: {"input_schema": {"type": "object"}, "type": {"enum": ["custom", None]}},
}  # of bodies, what is checked behind their types
_REQUIRED = {"ResponseBody": "input", "AnthropicTool": "input_schema"}
_UNREAD_NAMES = frozenset(struct.__name__ for struct in UNREAD)
_UNREAD_REFS = frozenset(REFS + name for name in _UNREAD_NAMES)
