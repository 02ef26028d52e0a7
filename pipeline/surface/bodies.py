"""Request bodies: strict types with the JSON path of what is wrong, unknown fields ignored, `null` the same as not given.

What Baton cannot honour yet is refused by name and not silently dropped; a value that asks for nothing is welcome.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import xxhash
from msgspec import Meta

from pipeline.errors import InvalidRequest
from pipeline.surface.allowed import allowed_at
from pipeline.surface.constraints import Alternatives, Pattern, ResponseFormat, Schema, StructuredOutputs
from pipeline.surface.fields import (
    CLIENTS_TEMPLATE,
    MOST_TOOLS,
    CacheSalt,
    Choices,
    Count,
    CountOrZero,
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
    StopTokenIds,
    Temperature,
    TemplateVariables,
    TopK,
    TopP,
    TruncatePromptTokens,
    refuse_unsupported,
    unless,
)
from pipeline.surface.messages import (
    AllowedTools,
    ChatMessage,
    NamedTool,
    Tool,
    check_continuation,
    check_messages,
    check_tools,
)

MOST_PROMPTS = 128  # in one request


class StreamOptions(msgspec.Struct):
    """`stream_options`; `continuous_usage_stats` as vLLM has it."""

    include_usage: Off | None = None
    continuous_usage_stats: Off | None = None


class Common(msgspec.Struct, kw_only=True):
    """Fields of both kinds of request that Baton honours (chats without `return_token_ids`), then those that it refuses unless they
    ask for nothing."""

    model: str
    max_tokens: Count | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    seed: Seed | None = None
    n: Choices | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: Off | None = None
    min_tokens: MinTokens | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    skip_special_tokens: On | None = None
    include_stop_str_in_output: Off | None = None
    return_token_ids: Off | None = None
    cache_salt: CacheSalt | None = None
    stream: Off | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    service_tier: ServiceTier | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: Pattern | None = None
    prompt_logprobs: Likeliest | None = None

    use_beam_search: Annotated[Any, unless(False)] = None


class ChatBody(Common, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], MOST_TOOLS] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: On | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: On | None = None
    chat_template_kwargs: TemplateVariables | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None
    logprobs: Off | None = None
    top_logprobs: Likeliest | None = None

    return_token_ids: Annotated[Any, unless(False)] = None
    echo: Annotated[Any, unless(False)] = None
    chat_template: Annotated[Any, CLIENTS_TEMPLATE] = None
    functions: Annotated[Any, unless([])] = None
    function_call: Annotated[Any, unless("none", "auto")] = None
    audio: Annotated[Any, unless()] = None
    modalities: Annotated[Any, unless(["text"])] = None
    prediction: Annotated[Any, unless()] = None
    web_search_options: Annotated[Any, unless()] = None


class CompletionBody(Common, kw_only=True):
    """The body of /v1/completions. `prompt`: a text, token ids, or a list of these."""

    prompt: str | list[str | int | list[int]]
    max_tokens: CountOrZero | None = None
    best_of: Choices | None = None
    echo: Off | None = None
    logprobs: Likeliest | bool | None = None  # false is taken for null
    suffix: Annotated[Any, unless("")] = None


_SAME_ANSWER = frozenset(["stream", "priority", "service_tier"])

_canonical = msgspec.json.Encoder(order="sorted").encode
_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)


def chat_body(raw: bytes) -> ChatBody:
    """Decode and check a chat request. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: ChatBody = decoded(_chat_decoder, raw)
    _check_common(body)
    check_messages(body.messages)
    check_tools(body.tools or [], body.tool_choice)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    check_continuation(body.messages, body.continue_final_message, body.add_generation_prompt)
    return body


def completion_body(raw: bytes) -> CompletionBody:
    """Decode and check a completion request. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: CompletionBody = decoded(_completion_decoder, raw)
    _check_common(body)
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise InvalidRequest(f"best_of is less than n = {body.n}", param="best_of")
    if body.best_of is not None and body.best_of > (body.n or 1) and body.stream:
        raise InvalidRequest("best_of more than n cannot be streamed: the best are known in the end", param="best_of")
    if body.logprobs is True:
        raise InvalidRequest("logprobs: expected `int`, got `bool`", param="logprobs")
    if body.max_tokens == 0 and not (body.echo or body.prompt_logprobs is not None):
        raise InvalidRequest(
            "max_tokens is 0, so there is nothing to answer but with echo or prompt_logprobs", param="max_tokens"
        )
    return body


def prompts_of(body: CompletionBody) -> list[tuple[str, str | list[int]]]:
    """Each prompt as text or ids, with its path in the body. Raises InvalidRequest for a mixture."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    if all(type(part) is int for part in prompt):
        return [("prompt", [part for part in prompt if isinstance(part, int)])]
    if len(prompt) > MOST_PROMPTS:
        raise InvalidRequest(f"prompt has {len(prompt)} prompts, at most {MOST_PROMPTS} are taken", param="prompt")
    found: list[tuple[str, str | list[int]]] = []
    for position, one in enumerate(prompt):
        if isinstance(one, int):
            raise InvalidRequest(
                "prompt is a list of texts and lists of token ids, or of token ids", param=f"prompt[{position}]"
            )
        found.append((f"prompt[{position}]" if len(prompt) > 1 else "prompt", one))
    return found


def digest(body: msgspec.Struct) -> str:
    """Equal for bodies that ask for the same answer: the order of fields, `null`, and what changes only the way there do not count."""
    asked = {name: getattr(body, name) for name in body.__struct_fields__ if name not in _SAME_ANSWER}
    return xxhash.xxh3_128_hexdigest(_canonical({name: value for name, value in asked.items() if value is not None}))


def _check_common(body: ChatBody | CompletionBody) -> None:
    refuse_unsupported(body)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")


def decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """A body. Raises InvalidRequest with the path of the first thing that is wrong."""
    if not raw or raw.isspace():
        raise InvalidRequest("the body is empty: a JSON object is expected")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error), decoder.type) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


_AT_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_NOT_ALLOWED = re.compile(r"^Invalid (enum )?value ")


def invalid(text: str, kind: Any, under: str = "") -> InvalidRequest:
    """msgspec's message, with its path moved to `param`, and with what is allowed. `kind`: the type that was expected of the value that it
    speaks of; `under`: the path of that value."""
    found = _AT_PATH.search(text)
    inner = found["path"] if found else ""
    path = _under(under, inner)
    what = text[: found.start()] if found else text
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        what = "required field is missing"
    what = what[:1].lower() + what[1:200]
    if _NOT_ALLOWED.match(text) and (allowed := allowed_at(kind, inner)):
        what += f", expected {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}"
    return InvalidRequest(f"{path}: {what}" if path else f"the body: {what}", param=path or None)


def _under(path: str, inner: str) -> str:
    return path + inner if not path or not inner or inner.startswith("[") else f"{path}.{inner}"
