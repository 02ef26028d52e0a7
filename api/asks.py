"""What a body asks for, in the pipeline's words: conditions and sampling for the engine, a form for the answer, a conversation for the
template."""

from __future__ import annotations

from typing import Any

import msgspec

from api.bodies import ChatBody, CompletionBody
from api.constraints import guided_decoding
from api.messages import chosen_names, mode_of, template_messages, template_tools
from pipeline.answer_form import AUTO, NONE, REQUIRED, AnswerForm
from pipeline.errors import InvalidRequest
from pipeline.features import LOGIT_BIAS, LOGPROBS, MIN_P, PENALTIES, refuse_unserved
from pipeline.grammars import refuse_unusable
from pipeline.parsers.forced import arguments_schema, calls_schema
from pipeline.preprocess import Wanted
from pipeline.protocol import GuidedDecoding, OutputOptions, SamplingOptions, StopConditions
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


def check_served(body: Body, engine: str, schema_field: str = "response_format") -> None:
    """Raise InvalidRequest naming what the body asks for and the engine of its model does not serve, or a grammar that is none (which
    takes up to a tenth of a second to see). `schema_field`: what the client calls `response_format`."""
    for field, default, feature in _FEATURES:
        if getattr(body, field) not in (None, default):
            refuse_unserved(engine, feature, field)
    if body.logit_bias:
        refuse_unserved(engine, LOGIT_BIAS, "logit_bias")
    if _logprobs(body) is not None:
        refuse_unserved(engine, LOGPROBS, "logprobs")
    if _best_of(body):
        refuse_unserved(engine, LOGPROBS, "best_of")
    if (constraint := _constraint(body)) is not None:
        name, guided = constraint
        refuse_unusable(engine, guided, schema_field if name == "response_format" else name)


def has_constraint(body: Body) -> bool:
    """Whether the answer has to follow a grammar. Raises InvalidRequest where it should follow two."""
    return _constraint(body) is not None


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
    """What the client wants beside the prompt."""
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
