"""The body of `/v1/responses`. As for chats: strict types, unknown fields ignored, `null` the same as not given, and
what cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.errors import InvalidRequest
from pipeline.surface.bodies import decoded, invalid
from pipeline.surface.constraints import JsonObjectFormat, TextFormat
from pipeline.surface.fields import (
    MOST_TOOLS,
    CacheSalt,
    Count,
    Effort,
    Likeliest,
    LogitBias,
    MinP,
    MinTokens,
    Off,
    On,
    Penalty,
    Priority,
    RepetitionPenalty,
    Seed,
    ServiceTier,
    StopString,
    StopStrings,
    Temperature,
    TemplateVariables,
    TopK,
    TopP,
    refuse_unsupported,
    unless,
    unsupported,
)
from pipeline.surface.input_items import MOST_ITEMS
from pipeline.surface.messages import FunctionName

LOGPROBS = "message.output_text.logprobs"

Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class FunctionTool(msgspec.Struct):
    """A function that may be called. `parameters` is a JSON schema of an object."""

    name: FunctionName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ChosenFunction(msgspec.Struct, tag="function", tag_field="type"):
    """`tool_choice`: this one."""

    name: str


class AllowedFunction(msgspec.Struct):
    """A function by its name."""

    name: str
    type: Literal["function"] = "function"


class AllowedFunctions(msgspec.Struct, tag="allowed_tools", tag_field="type"):
    """`tool_choice`: `auto` or `required`, of these."""

    mode: Literal["auto", "required"]
    tools: list[AllowedFunction]


class SchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type"):
    """JSON by a schema; whatever `strict` says, the answer follows it."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    """`text`: the form of the answer."""

    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(msgspec.Struct):
    """`reasoning`. Reasoning is told as it is, so there is no summary of it whatever is asked for."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(msgspec.Struct):
    """Events are never padded, whatever is asked for."""

    include_obfuscation: bool | None = None


class ResponseBody(msgspec.Struct, kw_only=True):
    """The fields of OpenAI, those of sampling that chats have here, then those that are refused unless they ask for nothing."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Meta(max_length=MOST_ITEMS)] | None = None
    instructions: str | None = None
    tools: Annotated[list[dict[str, Any]], MOST_TOOLS] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions | None = None
    parallel_tool_calls: On | None = None
    max_tool_calls: Count | None = None  # of tools that the server calls: there are none
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Likeliest | None = None
    include: list[str] | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: ServiceTier | None = None
    store: On | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: Off | None = None
    stream_options: StreamOptions | None = None
    background: Off | None = None
    previous_response_id: str | None = None

    priority: Priority | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: Off | None = None
    cache_salt: CacheSalt | None = None
    chat_template_kwargs: TemplateVariables | None = None

    conversation: Annotated[Any, unless()] = None
    prompt: Annotated[Any, unless()] = None
    moderation: Annotated[Any, unless()] = None
    context_management: Annotated[Any, unless([])] = None
    background_options: Annotated[Any, unless({})] = None


_INCLUDABLE = frozenset(
    [
        LOGPROBS,
        "reasoning.encrypted_content",  # reasoning is told as it is
        # of what cannot be in a response here:
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    ]
)

_decoder = msgspec.json.Decoder(ResponseBody)


def response_body(raw: bytes) -> ResponseBody:
    """Decode and check a body, but for the items of its input. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: ResponseBody = decoded(_decoder, raw)
    refuse_unsupported(body)
    if body.input is None or len(body.input) == 0:
        raise InvalidRequest("input: a text or a list of items is expected", param="input")
    if body.background and body.store is False:
        raise InvalidRequest("background needs store: nobody could read the answer", param="background")
    if body.text is not None and body.text.verbosity in ("low", "high"):
        raise unsupported("text.verbosity")
    for position, name in enumerate(body.include or []):
        if name not in _INCLUDABLE:
            raise InvalidRequest(
                f"include[{position}]: there is no {name[:64]!r} to include", param=f"include[{position}]"
            )
    return body


def function_tools(body: ResponseBody) -> list[FunctionTool]:
    """The tools of a body. Raises InvalidRequest for one that is no function."""
    return [_function_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.tools or [])]


def _function_tool(tool: Mapping[str, Any], path: str) -> FunctionTool:
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"{path}: tools of type {str(tool.get('type'))[:64]!r} are not supported, only functions",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    try:
        return msgspec.convert(tool, FunctionTool)
    except msgspec.ValidationError as error:
        raise invalid(str(error), FunctionTool, path) from error
