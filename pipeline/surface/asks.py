"""What a body asks for, in the pipeline's words: conditions and sampling for the engine, a form for the answer, a conversation for the
template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.answer_form import AUTO, NONE, REQUIRED, AnswerForm
from pipeline.errors import InvalidRequest
from pipeline.features import LOGIT_BIAS, LOGPROBS, MIN_P, PENALTIES, PROMPT_LOGPROBS, refuse_unserved
from pipeline.grammars import refuse_unusable
from pipeline.parsers.forced import arguments_schema, calls_schema
from pipeline.preprocess import Preprocessor, Wanted
from pipeline.protocol import BackendInput, GuidedDecoding, OutputOptions, SamplingOptions, StopConditions
from pipeline.surface.bodies import ChatBody, CompletionBody
from pipeline.surface.constraints import guided_decoding
from pipeline.surface.messages import chosen_names, mode_of, template_messages, template_tools
from pipeline.tokenizer import Conversation

Body = ChatBody | CompletionBody

_CONSTRAINING = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


# What a field asks for beyond its default is a feature, which not every engine has.
_FEATURES: tuple[tuple[str, float, str], ...] = (
    ("min_p", 0, MIN_P),
    ("presence_penalty", 0, PENALTIES),
    ("frequency_penalty", 0, PENALTIES),
    ("repetition_penalty", 1, PENALTIES),
)


def served(body: Body, engine: str, schema_field: str = "response_format") -> Wanted:
    """What the client wants beside the prompt. Raises InvalidRequest naming what the engine of its model does not serve, or a grammar that
    is none (which takes up to a tenth of a second to see). `schema_field`: what the client calls `response_format`."""
    for field, default, feature in _FEATURES:
        if getattr(body, field) not in (None, default):
            refuse_unserved(engine, feature, field)
    if body.logit_bias:
        refuse_unserved(engine, LOGIT_BIAS, "logit_bias")
    if _logprobs(body) is not None:
        refuse_unserved(engine, LOGPROBS, "logprobs")
    if body.prompt_logprobs is not None:
        refuse_unserved(engine, PROMPT_LOGPROBS, "prompt_logprobs")
    if _echoed_logprobs(body) is not None:
        refuse_unserved(engine, PROMPT_LOGPROBS, "logprobs")
    if _best_of(body):
        refuse_unserved(engine, LOGPROBS, "best_of")
    if (constraint := _constraint(body)) is not None:
        name, guided = constraint
        refuse_unusable(engine, guided, schema_field if name == "response_format" else name)
    return _wanted(body, constraint)


def check_choices(body: Body, preprocessor: Preprocessor) -> None:
    """Raise InvalidRequest where the engine cannot run at once what the body asks for."""
    preprocessor.check_choices(body.n or 1, "n")
    preprocessor.check_choices(_best_of(body), "best_of")


def may_have_grammar(body: Body) -> bool:
    """Whether the answer may have to follow a grammar, which takes a while to make and check."""
    is_forced = isinstance(body, ChatBody) and mode_of(body.tool_choice) not in (AUTO, NONE)
    return is_forced or any(getattr(body, name) is not None for name in _CONSTRAINING)


def conversation(body: ChatBody) -> Conversation:
    """What the chat template is given."""
    effort = body.reasoning_effort
    of_effort = (
        {}
        if effort is None
        else {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}
    )
    return Conversation(
        messages=template_messages(body.messages),
        tools=[] if mode_of(body.tool_choice) == NONE else template_tools(body.tools or []),
        documents=body.documents or [],
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        variables={**of_effort, **(body.chat_template_kwargs or {})},
    )


def wanted(body: Body) -> Wanted:
    """What the client wants beside the prompt, whether or not an engine serves it."""
    return _wanted(body, _constraint(body))


def _wanted(body: Body, constraint: tuple[str, GuidedDecoding] | None) -> Wanted:
    longest = body.max_tokens
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
            n=_best_of(body) or body.n or 1,
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=max(0, body.top_k or 0),
            min_p=_given(body.min_p, 0.0),
            seed=body.seed,
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            logit_bias=body.logit_bias or None,
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            guided_decoding=constraint[1] if constraint is not None else None,
        ),
        output=OutputOptions(
            logprobs=0 if _best_of(body) and _logprobs(body) is None else _logprobs(body),
            prompt_logprobs=_prompt_logprobs(body),
            skip_special_tokens=body.skip_special_tokens is not False,
        ),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        cache_salt=body.cache_salt,
    )


def form(body: Body, service_tier: str) -> AnswerForm:
    """What the answer must know. `service_tier`: the one that is told, empty where none was asked for."""
    options = body.stream_options
    common: dict[str, Any] = {
        "service_tier": service_tier,
        "return_token_ids": bool(body.return_token_ids),
        "continuous_usage": options is not None and bool(options.continuous_usage_stats),
        "prompt_logprobs": body.prompt_logprobs,
    }
    if isinstance(body, CompletionBody):
        best: dict[str, Any] = (
            {"keeps": body.n or 1, "hides_logprobs": _logprobs(body) is None} if _best_of(body) else {}
        )
        return AnswerForm(echoes=bool(body.echo), **best, **common)
    allowed = chosen_names(body.tool_choice)
    tools = [
        tool for tool in template_tools(body.tools or []) if allowed is None or tool["function"]["name"] in allowed
    ]
    return AnswerForm(
        tools=tools,
        tool_choice=mode_of(body.tool_choice),
        shows_reasoning=body.include_reasoning is not False,
        **common,
    )


def _best_of(body: Body) -> int:
    """Of how many choices the best are told; 0 where all are."""
    asked = body.best_of if isinstance(body, CompletionBody) else None
    return asked if asked is not None and asked > (body.n or 1) else 0


def _logprobs(body: Body) -> int | None:
    """How many of the likeliest tokens are told with each; None: no log probabilities at all."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return None if body.logprobs is None or body.logprobs is False else body.logprobs


def _echoed_logprobs(body: Body) -> int | None:
    """How many of the likeliest are told with each token of a prompt that is echoed; None: the prompt has none."""
    return _logprobs(body) if isinstance(body, CompletionBody) and body.echo else None


def _prompt_logprobs(body: Body) -> int | None:
    """How many must be known at each token of the prompt."""
    asked = [top for top in (body.prompt_logprobs, _echoed_logprobs(body)) if top is not None]
    return max(asked, default=None)


def check_prompt_logprobs(body: Body, inputs: Sequence[BackendInput], most: int) -> None:
    """Raise InvalidRequest where the log probabilities of the prompts would have more than `most` entries in the answer."""
    if (top := _prompt_logprobs(body)) is None:
        return
    entries = sum(len(ready.token_ids) for ready in inputs) * (1 + top) * (body.n or 1)
    if entries > most:
        raise InvalidRequest(
            f"the log probabilities of the prompt would have {entries} entries (each token with its likeliest, in every choice), and "
            f"{most} are told at most: ask for fewer of the likeliest, or send a shorter prompt",
            param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )


def _constraint(body: Body) -> tuple[str, GuidedDecoding] | None:
    asked = guided_decoding({name: getattr(body, name) for name in _CONSTRAINING})
    forced = _forced_call(body) if isinstance(body, ChatBody) else None
    if asked is not None and forced is not None:
        raise InvalidRequest(f"one constraint a request: tool_choice and {asked[0]} ask for two", param=asked[0])
    return forced or asked


def _forced_call(body: ChatBody) -> tuple[str, GuidedDecoding] | None:
    """The grammar of calls that must be made."""
    choice = mode_of(body.tool_choice)
    if not body.tools or choice in (AUTO, NONE):
        return None
    tools, parallel = form(body, "").tools, body.parallel_tool_calls is not False
    schema = calls_schema(tools, parallel=parallel) if choice == REQUIRED else arguments_schema(tools[0])
    return "tool_choice", GuidedDecoding(json=msgspec.json.encode(schema).decode())


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)
