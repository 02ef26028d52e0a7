"""What the routes of responses answer. Types for the page, as in `answers.py`."""

from __future__ import annotations

from typing import Any, Literal, Union

import msgspec

from api.openapi.answers import Natural, Said, TokenLogprob
from pipeline.surface.responses_bodies import Metadata

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(Said, tag="output_text", tag_field="type"):
    """Text of a message."""

    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class ReasoningPart(Said, tag="reasoning_text", tag_field="type"):
    """Text of reasoning."""

    text: str


class OutputMessage(Said, tag="message", tag_field="type"):
    """What the model said."""

    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputTextPart]


class OutputReasoning(Said, tag="reasoning", tag_field="type"):
    """What the model thought; there is no summary of it."""

    id: str
    summary: list[Any]
    content: list[ReasoningPart]
    status: ItemStatus


class OutputCall(Said, tag="function_call", tag_field="type"):
    """A call that the model asks for; `arguments` is JSON."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseError(Said):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(Said):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class ReasoningEcho(Said):
    """As it was asked for."""

    effort: str | None
    summary: str | None


class InputTokensDetails(Said):
    """`cached_tokens`: of those of the prompt, they were computed before."""

    cached_tokens: Natural
    cache_write_tokens: Literal[0]


class OutputTokensDetails(Said):
    """Of those of the answer."""

    reasoning_tokens: Natural


class ResponseUsage(Said):
    """Tokens of a response."""

    input_tokens: Natural
    input_tokens_details: InputTokensDetails
    output_tokens: Natural
    output_tokens_details: OutputTokensDetails
    total_tokens: Natural


class ResponseObject(Said):
    """A response as it stands; what is not known yet is null. From `instructions` to `user` it repeats what was asked."""

    id: str
    object: Literal["response"]
    created_at: Natural
    status: Status
    background: bool
    completed_at: Natural | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: Metadata
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningEcho
    safety_identifier: str | None
    service_tier: Literal["default", "priority", "flex"]
    store: bool
    temperature: float
    presence_penalty: float
    frequency_penalty: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Natural
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    output: list[OutputItem]
    usage: ResponseUsage | None


class InputItemList(Said):
    """A page of what a response was asked, with the conversation before it."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class DeletedResponse(Said):
    """It is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ShortToken(Said):
    """A token that could have come, as events show it."""

    token: str
    logprob: float


class ShortLogprob(ShortToken):
    """A token that came, as events show it."""

    top_logprobs: list[ShortToken]


class Numbered(Said):
    """An event; the numbers of a response's events go from 0 on without a gap."""

    sequence_number: Natural


class Lifecycle(Numbered):
    """The response as it stands."""

    response: ResponseObject


class ItemBorder(Numbered):
    """An item begins or is over."""

    output_index: Natural
    item: OutputItem


class InItem(Numbered):
    """Of an item."""

    item_id: str
    output_index: Natural


class PartBorder(InItem):
    """The content of an item begins or is over."""

    content_index: Natural
    part: OutputTextPart | ReasoningPart


class TextPieces(InItem):
    """Text of a message: a `delta`, or all of it."""

    content_index: Natural
    logprobs: list[ShortLogprob]


class ReasoningPieces(InItem):
    """Text of reasoning: a `delta`, or all of it."""

    content_index: Natural


Fields = list[tuple[str, Any] | tuple[str, Any, Any]]
EVENTS: dict[str, tuple[type[Numbered], Fields]] = {
    **{
        f"response.{status}": (Lifecycle, [])
        for status in ("created", "queued", "in_progress", "completed", "incomplete", "failed")
    },
    "response.output_item.added": (ItemBorder, []),
    "response.output_item.done": (ItemBorder, []),
    "response.content_part.added": (PartBorder, []),
    "response.content_part.done": (PartBorder, []),
    "response.output_text.delta": (TextPieces, [("delta", str)]),
    "response.output_text.done": (TextPieces, [("text", str)]),
    "response.reasoning_text.delta": (ReasoningPieces, [("delta", str)]),
    "response.reasoning_text.done": (ReasoningPieces, [("text", str)]),
    "response.function_call_arguments.delta": (InItem, [("delta", str)]),
    "response.function_call_arguments.done": (InItem, [("name", str), ("arguments", str)]),
    "error": (Numbered, [("code", str), ("message", str), ("param", str | None)]),
}  # by type: what all of its kind have, and what it has beyond


def _event(kind: str, base: type[Numbered], fields: Fields) -> type[msgspec.Struct]:
    name = "Event" + "".join(word.title() for word in kind.replace("_", ".").split("."))
    return msgspec.defstruct(
        name, fields, bases=(base,), tag=kind, tag_field="type", kw_only=True, namespace={"__doc__": base.__doc__}
    )  # fmt: skip


ResponseEvent: Any = Union[tuple(_event(kind, *made) for kind, made in EVENTS.items())]  # noqa: UP007  # of a list that is made
