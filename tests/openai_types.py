"""What is said to a client, checked against the types that OpenAI and Anthropic publish: the models of their SDKs, in strict mode."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, get_args

import openai.types.responses as published
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel, TypeAdapter

# What Baton says beyond the types of these SDKs, by model.
EXTRA = {
    # others of OpenAI's own types and the Open Responses specification have them
    "Response": {"store", "presence_penalty", "frequency_penalty"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},  # the SDK before 3.0 requires it
    "Completion": {"service_tier"},  # as chats have it
    "WholeCompletion": {"service_tier"},
    "StreamedCompletion": {"service_tier"},
    # vLLM's
    "CompletionChoice": {"token_ids", "prompt_token_ids"},
    "WholeChoice": {"token_ids", "prompt_token_ids", "prompt_logprobs"},
    "StreamedChoice": {"token_ids", "prompt_token_ids", "prompt_logprobs"},
    "ChatCompletion": {"prompt_logprobs"},
    "ChatCompletionChunk": {"prompt_logprobs"},
    "ChatCompletionMessage": {"reasoning_content"},
    "ChoiceDelta": {"reasoning_content"},
    "Model": {"max_model_len"},
}


class EchoedLogprobs(Logprobs):
    """OpenAI's type lacks the null that stands for the first token of a prompt that is echoed."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class WholeChoice(CompletionChoice):
    """A choice of a completion."""

    logprobs: EchoedLogprobs | None = None


class WholeCompletion(Completion):
    """A completion."""

    choices: list[WholeChoice]  # type: ignore[assignment]


class StreamedChoice(WholeChoice):
    """OpenAI's type lacks the null that its streams have until the end of a choice."""

    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class StreamedCompletion(Completion):
    """An event of a stream of completions."""

    choices: list[StreamedChoice]  # type: ignore[assignment]


Model = TypeVar("Model", bound=BaseModel)


def strictly(model: type[Model], value: object) -> Model:
    """The value as this model (or one of a union). Fails where it is not one to the letter, or says more than `EXTRA` lists."""
    made = _adapter(model).validate_json(json.dumps(value), strict=True)
    for name, extra in _extras(made):
        assert extra <= EXTRA.get(name, set()), f"{name} has unknown fields: {extra - EXTRA.get(name, set())}"
    return made


@functools.cache
def _adapter(model: type[Model]) -> TypeAdapter[Model]:
    return TypeAdapter(model)


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
