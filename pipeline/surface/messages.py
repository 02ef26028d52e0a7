"""Messages and tools of a chat as OpenAI writes them, and as chat templates expect them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.answer_form import AUTO, NAMED
from pipeline.errors import InvalidRequest

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    """A part of a message's content."""

    text: str


class RefusalPart(msgspec.Struct, tag="refusal", tag_field="type"):
    """What an assistant said instead of an answer."""

    refusal: str


class ImagePart(msgspec.Struct, tag="image_url", tag_field="type"):
    """Not read."""


class AudioPart(msgspec.Struct, tag="input_audio", tag_field="type"):
    """Not read."""


class FilePart(msgspec.Struct, tag="file", tag_field="type"):
    """Not read."""


READ = (TextPart, RefusalPart)
UNREAD = (ImagePart, AudioPart, FilePart)
ContentPart = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class CalledFunction(msgspec.Struct):
    """`arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that an assistant made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """One message. Reasoning is taken under both of its names."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class Function(msgspec.Struct):
    """A function that may be called. `parameters` is a JSON schema of an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool; only functions are tools here."""

    function: Function
    type: Literal["function"] = "function"


class FunctionReference(msgspec.Struct):
    """A function by its name."""

    name: str


class NamedTool(msgspec.Struct, tag="function", tag_field="type"):
    """`tool_choice`: this one."""

    function: FunctionReference


class ToolReference(msgspec.Struct):
    """A tool by its function's name."""

    function: FunctionReference
    type: Literal["function"] = "function"


class AllowedToolsList(msgspec.Struct):
    """`auto` or `required`, of these."""

    mode: Literal["auto", "required"]
    tools: list[ToolReference]


class AllowedTools(msgspec.Struct, tag="allowed_tools", tag_field="type"):
    """`tool_choice`: some of the tools."""

    allowed_tools: AllowedToolsList


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools | None


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise InvalidRequest for what no template can show."""
    for position, message in enumerate(messages):
        path = f"messages[{position}]"
        for place, part in enumerate(message.content if isinstance(message.content, list) else []):
            if not isinstance(part, READ):
                raise InvalidRequest(
                    f"{path}.content[{place}]: models here read text only",
                    param=f"{path}.content[{place}].type",
                    code="unsupported_parameter",
                )
        if message.content is None and not (message.role == "assistant" and (message.tool_calls or message.refusal)):
            raise InvalidRequest(f"{path}.content: a text is expected, not null", param=f"{path}.content")
        if message.role == "tool" and not message.tool_call_id:
            raise InvalidRequest(f"{path}.tool_call_id: required field is missing", param=f"{path}.tool_call_id")
        for place, call in enumerate(message.tool_calls or []):
            if message.role != "assistant":
                raise InvalidRequest(f"{path}.tool_calls: only an assistant calls", param=f"{path}.tool_calls")
            arguments_of(call, f"{path}.tool_calls[{place}].function.arguments")


def check_continuation(messages: Sequence[ChatMessage], continues: bool | None, add_prompt: bool | None) -> None:
    """Raise InvalidRequest where there is no last message to go on with."""
    if continues and (add_prompt or messages[-1].role != "assistant"):
        raise InvalidRequest(
            "continue_final_message goes on with a last message of the assistant, without add_generation_prompt",
            param="continue_final_message",
        )


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise InvalidRequest where the tools and the choice among them do not go together."""
    names = [tool.function.name for tool in tools]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise InvalidRequest(
                f"tools[{position}]: {name!r} is there already", param=f"tools[{position}].function.name"
            )
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise InvalidRequest("tool_choice is only allowed with tools", param="tool_choice")
    for chosen in chosen_names(choice) or []:
        if chosen not in names:
            raise InvalidRequest(f"tool_choice: there is no tool {chosen[:64]!r}", param="tool_choice")


def chosen_names(choice: ToolChoice) -> list[str] | None:
    """The functions that a choice names; None where it names none."""
    match choice:
        case NamedTool():
            return [choice.function.name]
        case AllowedTools():
            return [tool.function.name for tool in choice.allowed_tools.tools]
    return None


def mode_of(choice: ToolChoice) -> str:
    """`auto`, `none`, `required` or `named`."""
    match choice:
        case NamedTool():
            return NAMED
        case AllowedTools():
            return choice.allowed_tools.mode
    return choice or AUTO


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content as one text, a developer's word as the system's, arguments as objects."""
    return [_template_message(message) for message in messages]


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates expect them: what was not given is not there."""
    return [{"type": "function", "function": _given(msgspec.structs.asdict(tool.function))} for tool in tools]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    said: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message),
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_of(call, "")},
            }
            for call in message.tool_calls
        ]
    return {**_given(said), "content": said["content"]}


def _text(message: ChatMessage) -> str:
    content = message.content
    if content is None:
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "\n".join(
        part.refusal if isinstance(part, RefusalPart) else part.text for part in content if isinstance(part, READ)
    )


def arguments_of(call: ToolCall, path: str) -> dict[str, Any]:
    """The arguments of a call, as templates take them. Raises InvalidRequest where they are no object."""
    try:
        return msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not the JSON of an object: {str(error)[:200]}", param=path) from error


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
