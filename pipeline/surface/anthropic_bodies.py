"""Bodies of `/v1/messages` as Anthropic writes them: strict types with the path of what is wrong, unknown fields ignored, `null` the same
as not given. `cache_control` is ignored: what prompts have in common is found without it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.errors import InvalidRequest
from pipeline.surface.bodies import decoded
from pipeline.surface.fields import (
    MOST_TOOLS,
    Count,
    CountedTopK,
    Effort,
    Off,
    StopStrings,
    Temperature,
    TopP,
    refuse_unsupported,
    unless,
)

CUSTOM = "custom"
SCHEMA_FIELD = "output_config.format"

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class TextBlock(msgspec.Struct, tag="text", tag_field="type"):
    """Text."""

    text: str


class ThinkingBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    """What a model thought. The signature is not looked at: whoever wrote the thoughts may give them back."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, tag="redacted_thinking", tag_field="type"):
    """Thoughts that only the service that made them can read."""


class ToolUseBlock(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]


class ImageBlock(msgspec.Struct, tag="image", tag_field="type"):
    """Not read."""


class DocumentBlock(msgspec.Struct, tag="document", tag_field="type"):
    """Not read."""


class SearchResultBlock(msgspec.Struct, tag="search_result", tag_field="type"):
    """Not read."""


NOT_READ = (ImageBlock, DocumentBlock, SearchResultBlock)


class ToolResultBlock(msgspec.Struct, tag="tool_result", tag_field="type"):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock] | None = None
    is_error: Off | None = None


ContentBlock = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
)


class Message(msgspec.Struct):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Meta(min_length=1)]


class Tool(msgspec.Struct):
    """A tool of the client's. Those that Anthropic's servers run have other types, and no schema."""

    name: ToolName
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Choice(msgspec.Struct, kw_only=True):
    """What all ways to choose have."""

    disable_parallel_tool_use: Off | None = None


class ChooseAuto(Choice, tag="auto", tag_field="type"):
    """As the model likes."""


class ChooseAny(Choice, tag="any", tag_field="type"):
    """One of the tools."""


class ChooseTool(Choice, tag="tool", tag_field="type"):
    """This one."""

    name: str


class ChooseNone(msgspec.Struct, tag="none", tag_field="type"):
    """None of them."""


class ThinkingEnabled(msgspec.Struct, tag="enabled", tag_field="type"):
    """The budget is for the template to use: nobody else counts thoughts."""

    budget_tokens: Count
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(msgspec.Struct, tag="adaptive", tag_field="type"):
    """As the model likes."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(msgspec.Struct, tag="disabled", tag_field="type"):
    """No thoughts."""


class SchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type"):
    """JSON by a schema."""

    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """`output_config`."""

    effort: Effort | None = None
    format: SchemaFormat | None = None


class Metadata(msgspec.Struct):
    """Taken and not used."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """The body of /v1/messages/count_tokens: what makes the prompt."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1, max_length=100_000)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], MOST_TOOLS] | None = None
    tool_choice: ChooseAuto | ChooseAny | ChooseTool | ChooseNone | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None

    container: Annotated[Any, unless("", {})] = None
    mcp_servers: Annotated[Any, unless([])] = None


class MessageBody(CountBody, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Count
    stop_sequences: StopStrings | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: CountedTopK | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    stream: Off | None = None


_count_decoder = msgspec.json.Decoder(CountBody)
_message_decoder = msgspec.json.Decoder(MessageBody)


def count_body(raw: bytes) -> CountBody:
    """Decode and check a body of which only the prompt counts. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: CountBody = decoded(_count_decoder, raw)
    _check(body)
    return body


def message_body(raw: bytes) -> MessageBody:
    """Decode and check a request for a message. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: MessageBody = decoded(_message_decoder, raw)
    _check(body)
    return body


def _check(body: CountBody) -> None:
    refuse_unsupported(body)
    for position, tool in enumerate(body.tools or []):
        _check_tool(tool, f"tools[{position}]")
    has_schema = body.output_config is not None and body.output_config.format is not None
    if has_schema and isinstance(body.tool_choice, ChooseAny | ChooseTool):
        raise InvalidRequest(
            f"one constraint a request: tool_choice and {SCHEMA_FIELD} ask for two", param=SCHEMA_FIELD
        )
    for position, message in enumerate(body.messages):
        _check_message(message, f"messages[{position}]")


def _check_tool(tool: Tool, path: str) -> None:
    if tool.type not in (None, CUSTOM):
        raise InvalidRequest(
            f"{path}: tools that the server runs ({tool.type[:64]}) are not there; give tools of your own",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    if tool.input_schema is None:
        raise InvalidRequest(f"{path}.input_schema: required field is missing", param=f"{path}.input_schema")


_ONLY = {
    ToolUseBlock: "assistant",
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
    ToolResultBlock: "user",
}


def _check_message(message: Message, path: str) -> None:
    for place, block in enumerate(message.content if isinstance(message.content, list) else []):
        here = f"{path}.content[{place}]"
        _check_read(block, here)
        if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
            for position, part in enumerate(block.content):
                _check_read(part, f"{here}.content[{position}]")
        if _ONLY.get(type(block), message.role) != message.role:
            kind = block.__struct_config__.tag
            raise InvalidRequest(f"{here}: no {kind} in a message of role {message.role}", param=f"{here}.type")


def _check_read(block: object, path: str) -> None:
    if isinstance(block, NOT_READ):
        raise InvalidRequest(f"{path}: models here read text only", param=f"{path}.type", code="unsupported_parameter")
