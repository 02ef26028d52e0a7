"""Request bodies: strict types with the JSON path of what is wrong, unknown fields ignored, `null` the same as not given.

What Baton cannot honour yet is refused by name and not silently dropped; a value that asks for nothing is welcome.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import xxhash
from msgspec import Meta

from api.constraints import Choices, Pattern, ResponseFormat, Schema, StructuredOutputs
from api.messages import AllowedTools, ChatMessage, NamedTool, Tool, check_continuation, check_messages, check_tools
from pipeline.errors import InvalidRequest
from pipeline.logprobs import MOST

Likeliest = Annotated[int, Meta(ge=0, le=MOST)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
MOST_PROMPTS = 128  # in one request
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct):
    """`stream_options`; `continuous_usage_stats` as vLLM has it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """Fields of both kinds of request that Baton honours (chats without `return_token_ids`), then those that it refuses unless they
    ask for nothing."""

    model: str
    max_tokens: Count | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    service_tier: Literal["auto", "default", "scale", "priority", "fast", "flex", "batch"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    prompt_logprobs: Any = None
    use_beam_search: Any = None


class ChatBody(Common, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Meta(pattern="^[a-z]{1,16}$")] | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None

    echo: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionBody(Common, kw_only=True):
    """The body of /v1/completions. `prompt`: a text, token ids, or a list of these."""

    prompt: str | list[str | int | list[int]]
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Likeliest | bool | None = None  # false is taken for null
    suffix: Any = None


# What asks for nothing beyond what is done anyway.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
}

_SAME_ANSWER = frozenset(["stream", "priority", "service_tier"])

_canonical = msgspec.json.Encoder(order="sorted").encode
_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)


def chat_body(raw: bytes) -> ChatBody:
    """Decode and check a chat request. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: ChatBody = decoded(_chat_decoder, raw)
    _check_common(body)
    if body.return_token_ids:
        raise unsupported("return_token_ids")
    if body.echo:
        raise unsupported("echo")
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
    if body.echo and body.logprobs is not None and body.logprobs is not False:
        raise InvalidRequest(
            "echo with logprobs is not supported: log probabilities of the prompt are not computed",
            param="logprobs",
            code="unsupported_parameter",
        )
    return body


def prompts_of(body: CompletionBody) -> list[tuple[str, str | list[int]]]:
    """Each prompt as text or ids, with its path in the body. Raises InvalidRequest for a mixture, and for several that are streamed."""
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
    if len(found) > 1 and body.stream:
        raise InvalidRequest(
            "several prompts have one whole answer: stream them one by one",
            param="stream",
            code="unsupported_parameter",
        )
    return found


def digest(body: msgspec.Struct) -> str:
    """Equal for bodies that ask for the same answer: the order of fields, `null`, and what changes only the way there do not count."""
    asked = {name: getattr(body, name) for name in body.__struct_fields__ if name not in _SAME_ANSWER}
    return xxhash.xxh3_128_hexdigest(_canonical({name: value for name, value in asked.items() if value is not None}))


def _check_common(body: ChatBody | CompletionBody) -> None:
    for name, harmless in _ASKS_NOTHING.items():
        value = getattr(body, name, None)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
        ):
            raise unsupported(name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")


def unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported", param=param, code="unsupported_parameter")


def decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """A body. Raises InvalidRequest with the path of the first thing that is wrong."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")


def invalid(text: str, under: str = "") -> InvalidRequest:
    """msgspec's message, with its path moved to `param`; `under`: the path of the value that it speaks of."""
    found = _AT_PATH.search(text)
    path = _under(under, found["path"] if found else "")
    what = text[: found.start()] if found else text
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        what = "required field is missing"
    what = what[:1].lower() + what[1:200]
    return InvalidRequest(f"{path}: {what}" if path else f"the body: {what}", param=path or None)


def _under(path: str, inner: str) -> str:
    return path + inner if not path or not inner or inner.startswith("[") else f"{path}.{inner}"
