"""The input of a response: a text or items, as OpenAI writes them, as they are kept and listed, and as messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from pipeline.errors import InvalidRequest
from pipeline.surface.bodies import invalid
from pipeline.surface.messages import CalledFunction, ChatMessage, FunctionName, TextPart, ToolCall, arguments_of
from pipeline.surface.shapes.response_items import item_id

MOST_ITEMS = 16_384


class InputText(msgspec.Struct, tag="input_text", tag_field="type"):
    """A part of what somebody said."""

    text: str


class OutputText(msgspec.Struct, tag="output_text", tag_field="type"):
    """A part of what an assistant said."""

    text: str


class Refusal(msgspec.Struct, tag="refusal", tag_field="type"):
    """What an assistant said instead of an answer."""

    refusal: str


class InputImage(msgspec.Struct, tag="input_image", tag_field="type"):
    """Not read."""


class InputFile(msgspec.Struct, tag="input_file", tag_field="type"):
    """Not read."""


class InputAudio(msgspec.Struct, tag="input_audio", tag_field="type"):
    """Not read."""


ContentPart = InputText | OutputText | Refusal | InputImage | InputFile | InputAudio
UNREAD = (InputImage, InputFile, InputAudio)


class SummaryText(msgspec.Struct, tag="summary_text", tag_field="type"):
    """A part of a summary of reasoning."""

    text: str


class ReasoningText(msgspec.Struct, tag="reasoning_text", tag_field="type"):
    """A part of reasoning."""

    text: str


class Message(msgspec.Struct):
    """Somebody said something."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    id: str | None = None


class FunctionCall(msgspec.Struct):
    """An assistant called a function; `arguments` is JSON."""

    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None


class FunctionCallOutput(msgspec.Struct):
    """What a call gave."""

    call_id: str
    output: str | list[ContentPart]
    id: str | None = None


class Reasoning(msgspec.Struct):
    """What an assistant thought; its summary where the text itself is not there."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    id: str | None = None


InputItem = Message | FunctionCall | FunctionCallOutput | Reasoning
KINDS: dict[str, type[InputItem]] = {
    "message": Message,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": Reasoning,
}


def read_items(given: str | Sequence[Mapping[str, Any]], known_calls: frozenset[str] = frozenset()) -> list[InputItem]:
    """Decode and check an input. `known_calls`: ids of calls that were made before it. Raises InvalidRequest with the path of the first
    thing that is wrong."""
    if isinstance(given, str):
        return [Message("user", given)]
    items: list[InputItem] = []
    calls = set(known_calls)
    for position, one in enumerate(given):
        path = f"input[{position}]"
        item = _read(one, path)
        if isinstance(item, FunctionCall):
            arguments_of(_tool_call(item), f"{path}.arguments")
            calls.add(item.call_id)
        if isinstance(item, FunctionCallOutput) and item.call_id not in calls:
            raise InvalidRequest(
                f"{path}: there is no call {item.call_id[:100]!r} before its output", param=f"{path}.call_id"
            )
        items.append(item)
    return items


def calls_in(items: Sequence[InputItem]) -> frozenset[str]:
    """The ids of the calls among these items."""
    return frozenset(item.call_id for item in items if isinstance(item, FunctionCall))


def kept_items(items: Sequence[InputItem], request_id: str) -> list[dict[str, Any]]:
    """Items as they are kept with a request and listed: with an id each, texts as parts."""
    return [_kept(item, request_id, place) for place, item in enumerate(items)]


def messages_of(items: Sequence[InputItem]) -> list[ChatMessage]:
    """The conversation that items are: what an assistant thought, said and called in a row is one message."""
    messages: list[ChatMessage] = []
    said: ChatMessage | None = None  # the assistant's message that goes on
    for item in items:
        match item:
            case Message(role="assistant"):
                said = _goes_on(messages, said if said is not None and not (said.content or said.tool_calls) else None)
                said.content = _texts(item.content)
            case Reasoning():
                said = _goes_on(messages, None)
                said.reasoning_content = "\n".join(part.text for part in item.content or item.summary)
            case FunctionCall():
                said = _goes_on(messages, said)
                said.tool_calls = said.tool_calls or []
                said.tool_calls.append(_tool_call(item))
            case Message():
                said = None
                messages.append(ChatMessage(item.role, _texts(item.content)))
            case FunctionCallOutput():
                said = None
                messages.append(ChatMessage("tool", _texts(item.output), tool_call_id=item.call_id))
    for message in messages:
        if message.content is None and not message.tool_calls:  # reasoning alone
            message.content = ""
    return messages


def _goes_on(messages: list[ChatMessage], said: ChatMessage | None) -> ChatMessage:
    if said is None:
        said = ChatMessage("assistant")
        messages.append(said)
    return said


def _read(one: Mapping[str, Any], path: str) -> InputItem:
    kind = "message" if one.get("type") is None else one["type"]
    struct = KINDS.get(kind) if isinstance(kind, str) else None
    if struct is None:
        raise InvalidRequest(
            f"{path}: items of type {str(kind)[:64]!r} are not read, only {', '.join(KINDS)}",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    try:
        item = msgspec.convert(one, struct)
    except msgspec.ValidationError as error:
        raise invalid(str(error), struct, path) from error
    for name in ("content", "output"):
        parts = getattr(item, name, None)
        for place, part in enumerate(parts if isinstance(parts, list) else []):
            if isinstance(part, UNREAD):
                raise InvalidRequest(
                    f"{path}.{name}[{place}]: models here read text only",
                    param=f"{path}.{name}[{place}].type",
                    code="unsupported_parameter",
                )
    return item


def _tool_call(item: FunctionCall) -> ToolCall:
    return ToolCall(item.call_id, CalledFunction(item.name, item.arguments))


def _texts(content: str | Sequence[ContentPart]) -> str | list[Any]:
    return content if isinstance(content, str) else [TextPart(_text(part)) for part in content]


def _text(part: ContentPart) -> str:
    match part:
        case InputText() | OutputText():
            return part.text
        case Refusal():
            return part.refusal
    return ""


def _kept(item: InputItem, request_id: str, place: int) -> dict[str, Any]:
    def named(prefix: str) -> str:
        return item.id or item_id(request_id, f"{prefix}_in", place)

    match item:
        case Message():
            parts = [item.content] if isinstance(item.content, str) else [_text(part) for part in item.content]
            said = [_part(item.role, text) for text in parts]
            return {
                "id": named("msg"),
                "type": "message",
                "role": item.role,
                "status": "completed",
                "content": said,
            }
        case FunctionCall():
            fields = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return {"id": named("fc"), "type": "function_call", "status": "completed", **fields}
        case FunctionCallOutput():
            output: Any = (
                item.output if isinstance(item.output, str) else [_part("user", _text(one)) for one in item.output]
            )
            given = {"call_id": item.call_id, "output": output}
            return {"id": named("fco"), "type": "function_call_output", "status": "completed", **given}
        case Reasoning():
            thought = {} if item.content is None else {"content": _plain(item.content)}
            return {"id": named("rs"), "type": "reasoning", "summary": _plain(item.summary), **thought}


def _part(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def _plain(parts: Sequence[Any]) -> Any:
    return msgspec.to_builtins(parts)
