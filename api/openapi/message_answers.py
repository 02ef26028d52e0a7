"""What the routes of Anthropic's clients answer. Types for the page, as in `answers.py`."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from api.openapi.answers import Natural, Said

StopReason = Literal["end_turn", "max_tokens", "tool_use", "stop_sequence"]


class AnthropicProblem(Said):
    """What went wrong; the message names the field."""

    type: str
    message: str


class AnthropicError(Said, tag="error", tag_field="type"):
    """An error; as the last event of a stream it has no `request_id`, which is the `X-Request-Id`."""

    error: AnthropicProblem
    request_id: str | UnsetType = UNSET


class TextAnswer(Said, tag="text", tag_field="type"):
    """What the model said."""

    text: str


class ThinkingAnswer(Said, tag="thinking", tag_field="type"):
    """What the model thought."""

    thinking: str
    signature: Literal[""]


class ToolUseAnswer(Said, tag="tool_use", tag_field="type"):
    """A call that the model asks for."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextAnswer | ThinkingAnswer | ToolUseAnswer


class MessageUsage(Said):
    """`input_tokens` and `cache_read_input_tokens` add up to the prompt."""

    input_tokens: Natural
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Natural
    output_tokens: Natural
    service_tier: Literal["standard", "priority", "batch"] | UnsetType = UNSET


class MessageAnswer(Said, tag="message", tag_field="type"):
    """The message."""

    id: str
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Said):
    """Of the prompt."""

    input_tokens: Natural


class MessageStart(Said, tag="message_start", tag_field="type"):
    """The message without its content."""

    message: MessageAnswer


class Ping(Said, tag="ping", tag_field="type"):
    """The connection lives."""


class BlockStart(Said, tag="content_block_start", tag_field="type"):
    """A block begins."""

    index: Natural
    content_block: Block


class TextDelta(Said, tag="text_delta", tag_field="type"):
    """More text."""

    text: str


class ThinkingDelta(Said, tag="thinking_delta", tag_field="type"):
    """More thoughts."""

    thinking: str


class SignatureDelta(Said, tag="signature_delta", tag_field="type"):
    """Before the end of a block of thoughts."""

    signature: Literal[""]


class InputJsonDelta(Said, tag="input_json_delta", tag_field="type"):
    """More of the JSON that a tool is given."""

    partial_json: str


class BlockDelta(Said, tag="content_block_delta", tag_field="type"):
    """A block goes on."""

    index: Natural
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockStop(Said, tag="content_block_stop", tag_field="type"):
    """A block is over."""

    index: Natural


class Stopped(Said):
    """Why the message is over."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Said, tag="message_delta", tag_field="type"):
    """Why the message is over, and what it took."""

    delta: Stopped
    usage: MessageUsage


class MessageStop(Said, tag="message_stop", tag_field="type"):
    """The last event of a message."""


MessageEvent = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicError
)  # fmt: skip
