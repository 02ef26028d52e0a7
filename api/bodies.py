"""Request bodies: strict types with the JSON path of what is wrong, unknown fields ignored, `null` the same as not given.

What Baton cannot honour yet is refused by name and not silently dropped; a value that asks for nothing is welcome.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import xxhash
from msgspec import Meta

from api.constraints import Choices, Pattern, ResponseFormat, Schema, StructuredOutputs, guided_decoding
from pipeline.errors import InvalidRequest
from pipeline.features import GUIDED_DECODING, LOGPROBS, refuse_unserved
from pipeline.logprobs import MOST
from pipeline.preprocess import Wanted
from pipeline.protocol import GuidedDecoding, OutputOptions, SamplingOptions, StopConditions

Likeliest = Annotated[int, Meta(ge=0, le=MOST)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(msgspec.Struct):
    """`stream_options`"""

    include_usage: bool | None = None


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    """A part of a message's content."""

    text: str


class ChatMessage(msgspec.Struct):
    """One message; tool calls come with the tools."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    tool_calls: Any = None


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
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    service_tier: Literal["auto", "default", "scale", "priority", "flex", "batch"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    min_p: Any = None
    prompt_logprobs: Any = None
    use_beam_search: Any = None
    echo: Any = None


class ChatBody(Common, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None


class CompletionBody(Common, kw_only=True):
    """The body of /v1/completions. `prompt`: a text, token ids, or a list of one of these."""

    prompt: str | list[str | int | list[int]]
    best_of: Annotated[int, Meta(ge=1)] | None = None
    logprobs: Likeliest | bool | None = None  # false is taken for null
    suffix: Any = None


# What asks for nothing beyond what is done anyway.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "suffix": ("",),
}

_CONSTRAINING = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)

_SAME_ANSWER = frozenset(["stream", "priority", "service_tier"])

_canonical = msgspec.json.Encoder(order="sorted").encode
_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)


def chat_body(raw: bytes) -> ChatBody:
    """Decode and check a chat request. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: ChatBody = decoded(_chat_decoder, raw)
    _check_common(body)
    if body.return_token_ids:
        raise _unsupported("return_token_ids")
    for position, message in enumerate(body.messages):
        if message.tool_calls:
            raise _unsupported(f"messages[{position}].tool_calls")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    return body


def completion_body(raw: bytes) -> CompletionBody:
    """Decode and check a completion request. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: CompletionBody = decoded(_completion_decoder, raw)
    _check_common(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of other than n is not supported", param="best_of", code="unsupported_parameter")
    if body.logprobs is True:
        raise InvalidRequest("logprobs: expected `int`, got `bool`", param="logprobs")
    return body


def template_messages(body: ChatBody) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content as one text, a developer's word as the system's."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": _content_text(message.content),
            **({"name": message.name} if message.name is not None else {}),
        }
        for message in body.messages
    ]


def single_prompt(body: CompletionBody) -> str | list[int]:
    """The prompt as text or ids. Raises InvalidRequest for several prompts: they are several requests."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return prompt
    if all(type(part) is int for part in prompt):
        return [part for part in prompt if isinstance(part, int)]
    if len(prompt) != 1:
        raise InvalidRequest(
            "one prompt a request: send several requests", param="prompt", code="unsupported_parameter"
        )
    (only,) = prompt
    return only if isinstance(only, (str, list)) else [only]


def wanted(body: ChatBody | CompletionBody) -> Wanted:
    """What the client wants beside the prompt, in the pipeline's words."""
    longest, constraint = body.max_tokens, _constraint(body)
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        longest = body.max_completion_tokens
    return Wanted(
        stop=StopConditions(
            max_tokens=longest,
            stop=([body.stop] if isinstance(body.stop, str) else body.stop) or None,
            stop_token_ids=body.stop_token_ids or None,
            min_tokens=body.min_tokens or None,
            ignore_eos=bool(body.ignore_eos),
        ),
        sampling=SamplingOptions(
            n=body.n or 1,
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=max(0, body.top_k or 0),
            seed=body.seed,
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            guided_decoding=constraint[1] if constraint is not None else None,
        ),
        output=OutputOptions(logprobs=_logprobs(body), skip_special_tokens=body.skip_special_tokens is not False),
    )


def check_served(body: ChatBody | CompletionBody, engine: str) -> None:
    """Raise InvalidRequest naming what the body asks for and the engine of its model does not serve."""
    if (constraint := _constraint(body)) is not None:
        refuse_unserved(engine, GUIDED_DECODING, constraint[0])
    if _logprobs(body) is not None:
        refuse_unserved(engine, LOGPROBS, "logprobs")


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    """How many of the likeliest tokens are told with each; None: no log probabilities at all."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return None if body.logprobs is None or body.logprobs is False else body.logprobs


def _constraint(body: ChatBody | CompletionBody) -> tuple[str, GuidedDecoding] | None:
    return guided_decoding({name: getattr(body, name) for name in _CONSTRAINING})


def digest(body: msgspec.Struct) -> str:
    """Equal for bodies that ask for the same answer: the order of fields, `null`, and what changes only the way there do not count."""
    asked = {name: getattr(body, name) for name in body.__struct_fields__ if name not in _SAME_ANSWER}
    return xxhash.xxh3_128_hexdigest(_canonical({name: value for name, value in asked.items() if value is not None}))


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _content_text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _check_common(body: ChatBody | CompletionBody) -> None:
    for name, harmless in _ASKS_NOTHING.items():
        value = getattr(body, name, None)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
        ):
            raise _unsupported(name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")


def _unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported", param=param, code="unsupported_parameter")


def decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """A body. Raises InvalidRequest with the path of the first thing that is wrong."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")


def _invalid(text: str) -> InvalidRequest:
    """msgspec's message, with its path moved to `param`."""
    found = _AT_PATH.search(text)
    path = found["path"] if found else ""
    what = text[: found.start()] if found else text
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        what = "required field is missing"
    what = what[:1].lower() + what[1:200]
    return InvalidRequest(f"{path}: {what}" if path else f"the body: {what}", param=path or None)
