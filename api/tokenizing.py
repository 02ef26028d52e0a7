"""`/tokenize` and `/detokenize`, at the root and under `/v1`, with the bodies and answers of vLLM. No worker takes part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import Meta
from starlette.responses import Response

from api.generation import INLINE_BYTES, admitted_body, served_pool
from api.service import Service
from pipeline.errors import InvalidRequest
from pipeline.pools import ServedPool
from pipeline.surface.bodies import decoded
from pipeline.surface.fields import CLIENTS_TEMPLATE, Off, On, TemplateVariables, refuse_unsupported
from pipeline.surface.messages import (
    ChatMessage,
    Tool,
    check_continuation,
    check_messages,
    check_tools,
    template_messages,
    template_tools,
)
from pipeline.tokenizer import Conversation, NoTokenizer, Tokenizer


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of /tokenize: a `prompt`, or `messages` by the model's chat template. Special tokens are added to a prompt unless it says
    otherwise, to messages only if it says so: the template has its own."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: On | None = None
    chat_template_kwargs: TemplateVariables | None = None
    continue_final_message: Off | None = None
    tools: list[Tool] | None = None
    return_token_strs: Off | None = None

    chat_template: Annotated[Any, CLIENTS_TEMPLATE] = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]


_OF_MESSAGES = ("add_generation_prompt", "chat_template_kwargs", "continue_final_message", "tools")
_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


def tokenizing_routes(service: Service) -> APIRouter:
    """The routes between text and token ids."""
    router = APIRouter()

    @router.post("/tokenize")
    @router.post("/v1/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = tokenize_body(raw)
        pool = _pool_of(service, http, body.model)
        return await _answer(len(raw), lambda: tokenized(pool, body))

    @router.post("/detokenize")
    @router.post("/v1/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body: DetokenizeBody = decoded(_detokenize_decoder, raw)
        pool = _pool_of(service, http, body.model)
        return await _answer(len(raw), lambda: detokenized(pool, body))

    return router


def tokenize_body(raw: bytes) -> TokenizeBody:
    """Decode and check the body of /tokenize. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: TokenizeBody = decoded(_tokenize_decoder, raw)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("either prompt or messages is needed, and not both", param="prompt")
    refuse_unsupported(body)
    for name in _OF_MESSAGES if body.messages is None else ():
        if getattr(body, name):
            raise InvalidRequest(f"{name} is only allowed with messages", param=name)
    check_messages(body.messages or [])
    check_tools(body.tools or [], None)
    check_continuation(body.messages or [], body.continue_final_message, body.add_generation_prompt)
    return body


def tokenized(pool: ServedPool, body: TokenizeBody) -> dict[str, Any]:
    """The answer of /tokenize; `token_strs` is null unless it was asked for, as vLLM has it."""
    tokenizer = _tokenizer_of(pool)
    if body.messages is not None:
        text = tokenizer.render(
            Conversation(
                messages=template_messages(body.messages),
                tools=template_tools(body.tools or []),
                add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
                continue_final_message=bool(body.continue_final_message),
                variables=body.chat_template_kwargs or {},
            )
        )
        token_ids = tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    else:
        token_ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    return {
        "count": len(token_ids),
        "max_model_len": pool.preprocessor.max_model_len,
        "tokens": token_ids,
        "token_strs": tokenizer.token_strs(token_ids) if body.return_token_strs else None,
    }


def detokenized(pool: ServedPool, body: DetokenizeBody) -> dict[str, Any]:
    """The answer of /detokenize: the text of all tokens, special ones too."""
    tokenizer = _tokenizer_of(pool)
    pool.preprocessor.check_ids(body.tokens, "tokens")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _pool_of(service: Service, http: HttpRequest, model: str | None) -> ServedPool:
    """The pool of a model; where none is named, the only one. Raises ModelNotFound and InvalidRequest."""
    if model is not None:
        return served_pool(service, http, model)
    if len(service.pools) != 1:
        raise InvalidRequest("model: required field is missing, several models are served here", param="model")
    return served_pool(service, http, next(iter(service.pools)))


def _tokenizer_of(pool: ServedPool) -> Tokenizer:
    tokenizer = pool.preprocessor.tokenizer
    if isinstance(tokenizer, NoTokenizer):
        raise InvalidRequest(
            f"model {pool.name!r} is served without a tokenizer: there is no text to its tokens",
            param="model",
            code="unsupported_parameter",
        )
    return tokenizer


async def _answer(body_bytes: int, make: Callable[[], dict[str, Any]]) -> Response:
    """In a thread where it is long, so that it does not hold up the streams."""

    def write() -> bytes:
        return msgspec.json.encode(make())

    data = write() if body_bytes <= INLINE_BYTES else await asyncio.to_thread(write)
    return Response(data, media_type="application/json")
