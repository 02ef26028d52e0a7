"""Bodies in, inputs of the engine out: what is asked of a pool, wherever its body came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from pipeline.ids import new_request_id
from pipeline.pools import ServedPool
from pipeline.protocol import BackendInput, RoutingHints
from pipeline.surface.asks import Body, check_choices, conversation, form, served
from pipeline.surface.bodies import ChatBody, CompletionBody, prompts_of
from pipeline.surface.input_items import calls_in, kept_items, read_items
from pipeline.surface.responses_asks import answer_form, as_chat, in_own_words, prepared
from pipeline.surface.responses_bodies import ResponseBody


def inputs_of(pool: ServedPool, body: Body, tier: str) -> list[BackendInput]:
    """Those of a chat or a completion, one a prompt. `tier`: the service tier that is told, empty for none. Raises InvalidRequest."""
    return [chat_input(pool, body, tier)] if isinstance(body, ChatBody) else completion_inputs(pool, body, tier)


def chat_input(pool: ServedPool, chat: ChatBody, tier: str, schema_field: str = "response_format") -> BackendInput:
    """That of a chat. Raises InvalidRequest, for a schema in the name that its client knows."""
    check_choices(chat, pool.preprocessor)
    wants, shown = served(chat, pool.engine, schema_field), form(chat, tier)
    ready = pool.preprocessor.chat(new_request_id(pool.name), conversation(chat), wants, shown)
    return under_name(pool, ready, chat.model)


def completion_inputs(pool: ServedPool, body: CompletionBody, tier: str) -> list[BackendInput]:
    """Those of a completion, one a prompt. Raises InvalidRequest."""
    check_choices(body, pool.preprocessor)
    wants, shown = served(body, pool.engine), form(body, tier)
    inputs = [
        pool.preprocessor.completion(new_request_id(pool.name), prompt, wants, shown, param=param)
        for param, prompt in prompts_of(body)
    ]
    return [under_name(pool, ready, body.model) for ready in inputs]


def response_input(
    pool: ServedPool, request_id: str, body: ResponseBody, before: Sequence[dict[str, Any]], lane: str
) -> BackendInput:
    """That of a response. `before`: the conversation that it goes on from, as items. Raises InvalidRequest, ContextLengthExceeded."""
    earlier = read_items(before)
    assert body.input is not None  # `response_body` saw to it
    new = read_items(body.input, calls_in(earlier))
    chat = as_chat(body, [*earlier, *new])
    with in_own_words():
        wants = served(chat, pool.engine)
    told = answer_form(body, chat, [*before, *kept_items(new, request_id)], lane)
    ready = prepared(pool.preprocessor, request_id, chat, wants, told, truncates=body.truncation == "auto")
    return under_name(pool, ready, body.model)


def under_name(pool: ServedPool, ready: BackendInput, model: str) -> BackendInput:
    """The same request for an adapter of the pool's model, which is what the answer says it came from, where one was asked for."""
    if model == pool.name:
        return ready
    return replace(ready, model=model, routing=replace(ready.routing or RoutingHints(), lora_name=model))
