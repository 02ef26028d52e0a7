"""A request for a message as the chat that it is: from here on it goes the way of chats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pipeline.errors import InvalidRequest
from pipeline.surface.anthropic_bodies import (
    ChooseAny,
    ChooseAuto,
    ChooseNone,
    ChooseTool,
    CountBody,
    Message,
    MessageBody,
    TextBlock,
    ThinkingAdaptive,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolResultBlock,
    ToolUseBlock,
)
from pipeline.surface.bodies import ChatBody
from pipeline.surface.constraints import JsonSchemaFormat, NamedSchema
from pipeline.surface.messages import (
    CalledFunction,
    ChatMessage,
    ContentPart,
    Function,
    FunctionReference,
    NamedTool,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    check_tools,
)

TIERS = {None: None, "auto": "auto", "standard_only": "default"}
FAILED = "Error: "  # in front of what a tool says that failed: chat templates know no other way

_encode = msgspec.json.Encoder().encode


def chat_of(body: CountBody) -> ChatBody:
    """The same request as a chat. Raises InvalidRequest where its turns or tools do not fit together."""
    messages, goes_on = chat_messages(body)
    choice = body.tool_choice
    chat = ChatBody(
        model=body.model,
        messages=messages,
        continue_final_message=goes_on or None,
        tools=[_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or []] or None,
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=False
        if not isinstance(choice, ChooseNone | None) and choice.disable_parallel_tool_use
        else None,
        include_reasoning=None if _shows_thinking(body) else False,
        chat_template_kwargs=_variables(body) or None,
    )
    check_tools(chat.tools or [], chat.tool_choice)
    if (config := body.output_config) is not None:
        chat.reasoning_effort = config.effort
        chat.response_format = JsonSchemaFormat(NamedSchema(config.format.schema)) if config.format else None
    if isinstance(body, MessageBody):
        chat.max_tokens, chat.stop, chat.stream = body.max_tokens, body.stop_sequences, body.stream
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.service_tier = TIERS[body.service_tier]  # type: ignore[assignment]  # the values are some of its literals
    return chat


def chat_messages(body: CountBody) -> tuple[list[ChatMessage], bool]:
    """Turns as a chat has them, and whether the answer goes on with the last one: Anthropic's clients begin an answer that way.

    Results of tools are messages of their own; neighbouring turns of one role are one, as Anthropic has it. Raises InvalidRequest.
    """
    said = [ChatMessage("system", [*_texts(body.system)])] if body.system else []
    names: dict[str, str] = {}
    for role, turns in itertools.groupby(enumerate(body.messages), lambda turn: turn[1].role):
        if role == "assistant":
            blocks = [block for _, message in turns for block in _blocks(message)]
            names |= {block.id: block.name for block in blocks if isinstance(block, ToolUseBlock)}
            said.append(_assistant(blocks))
            continue
        for position, message in turns:
            for one in _asked(message, names, f"messages[{position}]"):
                _add(said, one)
    last = said[-1]
    if last.role != "assistant":
        return said, False
    if last.tool_calls:
        raise InvalidRequest("the last message calls tools: their tool_result blocks are to follow", param="messages")
    return (said, True) if last.content else (said[:-1], False)


def _blocks(message: Message) -> Sequence[object]:
    return [TextBlock(message.content)] if isinstance(message.content, str) else message.content


def _asked(message: Message, names: dict[str, str], path: str) -> Iterator[ChatMessage]:
    """What is said to the assistant. `names`: of the tools by the ids of their calls so far."""
    for place, block in enumerate(_blocks(message)):
        if isinstance(block, ToolResultBlock):
            yield _result(block, names, f"{path}.content[{place}]")
        elif isinstance(block, TextBlock):
            yield ChatMessage(message.role, [TextPart(block.text)])


def _assistant(blocks: Sequence[object]) -> ChatMessage:
    calls = [
        ToolCall(block.id, CalledFunction(block.name, _encode(block.input).decode()))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking)
    texts: list[ContentPart] = [TextPart(block.text) for block in blocks if isinstance(block, TextBlock) and block.text]
    return ChatMessage("assistant", texts, tool_calls=calls or None, reasoning_content=thoughts or None)


def _result(block: ToolResultBlock, names: dict[str, str], path: str) -> ChatMessage:
    if block.tool_use_id not in names:
        raise InvalidRequest(
            f"{path}: no tool_use before it has the id {block.tool_use_id[:64]!r}", param=f"{path}.tool_use_id"
        )
    texts = [part.text for part in _texts(block.content or "")]
    joined = (FAILED if block.is_error else "") + "\n".join(texts)
    return ChatMessage("tool", joined, name=names[block.tool_use_id], tool_call_id=block.tool_use_id)


def _add(said: list[ChatMessage], turn: ChatMessage) -> None:
    """A text to the assistant joins the one before it."""
    last = said[-1] if said else None
    if last is None or last.role != turn.role or turn.role != "user":
        said.append(turn)
        return
    assert isinstance(last.content, list)
    assert isinstance(turn.content, list)
    last.content += turn.content


def _texts(content: str | Sequence[object]) -> list[TextPart]:
    if isinstance(content, str):
        return [TextPart(content)]
    return [TextPart(block.text) for block in content if isinstance(block, TextBlock)]


def _tool(name: str, description: str | None, schema: dict[str, Any] | None) -> Tool:
    return Tool(Function(name, description, schema))


def _tool_choice(choice: ChooseAuto | ChooseAny | ChooseTool | ChooseNone | None) -> ToolChoice:
    match choice:
        case ChooseTool():
            return NamedTool(FunctionReference(choice.name))
        case ChooseAny():
            return "required"
        case ChooseNone():
            return "none"
    return None


def _variables(body: CountBody) -> dict[str, Any]:
    """What the chat template is told of thinking; it decides itself where nothing is said."""
    match body.thinking:
        case ThinkingEnabled():
            return {"enable_thinking": True, "thinking_budget": body.thinking.budget_tokens}
        case ThinkingAdaptive():
            return {"enable_thinking": True}
        case ThinkingDisabled():
            return {"enable_thinking": False}
    return {}


def _shows_thinking(body: CountBody) -> bool:
    thinking = body.thinking
    return not isinstance(thinking, ThinkingDisabled) and getattr(thinking, "display", None) != "omitted"
