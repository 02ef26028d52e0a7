"""What the body of a response asks for. It is said as a chat, so that both are understood in one place (`asks.py`), and errors are told in
the words of responses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec.structs import asdict

from pipeline.answer_form import AnswerForm
from pipeline.errors import ContextLengthExceeded, InvalidRequest
from pipeline.preprocess import Preprocessor, Wanted
from pipeline.protocol import BackendInput
from pipeline.routing import TIER_OF_LANE
from pipeline.surface.asks import conversation, form
from pipeline.surface.bodies import ChatBody
from pipeline.surface.constraints import JsonObjectFormat, JsonSchemaFormat, NamedSchema, ResponseFormat, TextFormat
from pipeline.surface.input_items import InputItem, messages_of
from pipeline.surface.messages import (
    AllowedTools,
    AllowedToolsList,
    ChatMessage,
    Function,
    FunctionReference,
    NamedTool,
    Tool,
    ToolChoice,
    ToolReference,
    check_tools,
)
from pipeline.surface.responses_bodies import (
    LOGPROBS,
    AllowedFunctions,
    ChosenFunction,
    ResponseBody,
    SchemaFormat,
    function_tools,
)

_SAME_IN_CHATS = (
    "temperature",
    "top_p",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "cache_salt",
    "chat_template_kwargs",
    "parallel_tool_calls",
)

_NAME_OF = {
    "messages": "input",
    "response_format": "text.format",
    "logprobs": "include",
    "reasoning_effort": "reasoning.effort",
}


def as_chat(body: ResponseBody, items: Sequence[InputItem]) -> ChatBody:
    """The chat that asks for the same answer. `items`: the whole conversation. Raises InvalidRequest for tools that cannot be."""
    with in_own_words():
        tools = [Tool(Function(**asdict(tool))) for tool in function_tools(body)]
        choice = _tool_choice(body)
        check_tools(tools, choice)
    instructions = [ChatMessage("system", body.instructions)] if body.instructions else []
    return ChatBody(
        model=body.model,
        messages=[*instructions, *messages_of(items)],
        tools=tools or None,
        tool_choice=choice,
        max_completion_tokens=body.max_output_tokens,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        response_format=_format(body),
        logprobs=True if LOGPROBS in (body.include or []) or body.top_logprobs else None,
        top_logprobs=body.top_logprobs,
        **{name: getattr(body, name) for name in _SAME_IN_CHATS},
    )


def prepared(
    preprocessor: Preprocessor, request_id: str, chat: ChatBody, wants: Wanted, told: AnswerForm, *, truncates: bool
) -> BackendInput:
    """The engine's input. `truncates`: what is too long goes without its oldest messages. Raises InvalidRequest,
    ContextLengthExceeded."""
    with in_own_words():
        if not truncates:
            return preprocessor.chat(request_id, conversation(chat), wants, told)
        return _longest_that_fits(preprocessor, request_id, chat, wants, told)


def may_have_grammar(body: ResponseBody) -> bool:
    """Whether the answer may have to follow a grammar, which takes a while to check."""
    return body.text is not None or body.tool_choice not in (None, "none", "auto")


def answer_form(body: ResponseBody, chat: ChatBody, kept: list[dict[str, Any]], lane: str) -> AnswerForm:
    """What the answer must know: what it repeats of its request, and the items that can be gone on from. `kept`: the whole conversation, as
    items that are listed; nothing of it is kept where the body says so."""
    stores = body.store is not False
    remembered = {
        "echo": echo(body, lane),
        "store": stores,
        "background": bool(body.background),
        "input": kept if stores else [],
    }
    return msgspec.structs.replace(form(chat, ""), body=remembered)


def echo(body: ResponseBody, lane: str) -> dict[str, Any]:
    """The fields of a response that repeat its request."""
    reasoning = body.reasoning
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": TIER_OF_LANE[lane],
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "text": {"format": _echoed_format(body)},
        "tool_choice": "auto" if body.tool_choice is None else msgspec.to_builtins(body.tool_choice),
        "tools": [{"type": "function", **asdict(tool)} for tool in function_tools(body)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


@contextlib.contextmanager
def in_own_words() -> Iterator[None]:
    """Errors of the chat that a response is said as, with the names of the response's fields."""
    try:
        yield
    except InvalidRequest as error:
        param = error.param or ""
        own = _NAME_OF.get(param, param.replace(".function.", "."))
        message = str(error).replace(param, own) if param in _NAME_OF and param != "messages" else str(error)
        raise type(error)(message, param=own or None, code=error.code) from error


def _longest_that_fits(
    preprocessor: Preprocessor, request_id: str, chat: ChatBody, wants: Wanted, told: AnswerForm
) -> BackendInput:
    """Without as few of the oldest messages as possible, so that the rest fits the context. Instructions and the last message stay."""

    def without(count: int) -> BackendInput:
        shorter = msgspec.structs.replace(chat, messages=_without_oldest(chat.messages, count))
        return preprocessor.chat(request_id, conversation(shorter), wants, told)

    try:
        return without(0)
    except ContextLengthExceeded:
        low, high = 1, max(1, len(chat.messages) - 1)
    while low < high:  # the fewest that must go lie in low..high
        middle = (low + high) // 2
        try:
            without(middle)
            high = middle
        except ContextLengthExceeded:
            low = middle + 1
    return without(low)


def _without_oldest(messages: Sequence[ChatMessage], count: int) -> list[ChatMessage]:
    """The last message and all instructions stay; what a call gave goes with its call."""
    rest = list(messages)
    while count > 0 or any(one.role == "tool" for one in _first_said(rest)):
        going = next((one for one in rest[:-1] if one.role not in ("system", "developer")), None)
        if going is None:
            break
        rest.remove(going)
        count -= 1
    return rest


def _first_said(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    return [one for one in messages if one.role not in ("system", "developer")][:1]


def _tool_choice(body: ResponseBody) -> ToolChoice:
    match body.tool_choice:
        case ChosenFunction(name=name):
            return NamedTool(FunctionReference(name))
        case AllowedFunctions(mode=mode, tools=tools):
            return AllowedTools(AllowedToolsList(mode, [ToolReference(FunctionReference(one.name)) for one in tools]))
        case choice:
            return choice


def _format(body: ResponseBody) -> ResponseFormat | None:
    match body.text.format if body.text is not None else None:
        case SchemaFormat(name=name, schema=schema):
            return JsonSchemaFormat(NamedSchema(schema, name))
        case JsonObjectFormat() as any_object:
            return any_object
    return None


def _echoed_format(body: ResponseBody) -> dict[str, Any]:
    asked = (body.text.format if body.text is not None else None) or TextFormat()
    shown: dict[str, Any] = msgspec.to_builtins(asked)
    return {name: value for name, value in shown.items() if value is not None}
