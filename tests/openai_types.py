"""What is said to a client, checked against OpenAI's published types: the pydantic models of its SDK, in strict mode."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

import openai.types.responses as published
from pydantic import BaseModel

# What Baton says beyond the types of this SDK, by model: others of OpenAI's own types and the Open Responses specification have them.
EXTRA = {
    "Response": {"store", "presence_penalty", "frequency_penalty"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},  # the SDK before 3.0 requires it
}


Model = TypeVar("Model", bound=BaseModel)


def strictly(model: type[Model], value: object) -> Model:
    """The value as this model. Fails where it is not one to the letter, or says more than `EXTRA` lists."""
    made = model.model_validate_json(json.dumps(value), strict=True)
    for name, extra in _extras(made):
        assert extra <= EXTRA.get(name, set()), f"{name} has unknown fields: {extra - EXTRA.get(name, set())}"
    return made


def _extras(value: object) -> Iterator[tuple[str, set[str]]]:
    if isinstance(value, BaseModel):
        yield type(value).__name__, set(value.model_extra or {})
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _extras(one)


def _event_models() -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    for name, model in vars(published).items():
        if name.endswith("Event") and inspect.isclass(model) and "sequence_number" in model.model_fields:
            (kind,) = get_args(model.model_fields["type"].annotation)
            found[kind] = model
    return found


EVENTS = _event_models()


def events_in(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream of `/v1/responses`, each checked; its bytes must be nothing else."""
    assert data.endswith(b"\n\n") or not data
    events: list[dict[str, Any]] = []
    for block in data.split(b"\n\n")[:-1]:
        name, said = (line for line in block.split(b"\n") if line != b": ping")
        event: dict[str, Any] = json.loads(said.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        strictly(EVENTS[event["type"]], event)
        events.append(event)
    return events
