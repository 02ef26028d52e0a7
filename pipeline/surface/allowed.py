"""The values that a place in a body may have, read from the body's type: for errors that say what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\[(?P<item>[^\]]*)\]|(?P<field>[^.\[\]]+)")


def allowed_at(kind: Any, path: str) -> list[str]:
    """The words that may stand at `path` (`messages[0].role`) of this type: values of a literal, tags of structs; none where others may."""
    places = list(_alternatives(inspect.type_info(kind)))
    for step in _STEP.finditer(path):
        places = [one for place in places for inner in _inner(place, step) for one in _alternatives(inner)]
    values = [value for place in places if isinstance(place, inspect.LiteralType) for value in place.values]
    return list(dict.fromkeys(str(value) for value in values))


def _alternatives(place: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(place, inspect.Metadata):
        yield from _alternatives(place.type)
    elif isinstance(place, inspect.UnionType):
        for one in place.types:
            yield from _alternatives(one)
    else:
        yield place


def _inner(place: inspect.Type, step: re.Match[str]) -> Iterator[inspect.Type]:
    """What stands one step further inside."""
    if isinstance(place, inspect.ListType) and step["field"] is None:
        yield place.item_type
    elif isinstance(place, inspect.DictType) and step["field"] is None:
        yield place.value_type
    elif isinstance(place, inspect.StructType):
        if place.tag_field == step["field"] and isinstance(place.tag, str):
            yield inspect.LiteralType((place.tag,))
        yield from (field.type for field in place.fields if field.encode_name == step["field"])
