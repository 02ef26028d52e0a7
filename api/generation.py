"""`/v1/chat/completions` and `/v1/completions`: a body becomes a `Request`, a `Request` becomes an answer."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec.structs import replace
from starlette.responses import Response

from api.access import caller_of
from api.answers import Answer, StreamedAnswer, WholeAnswer
from api.asks import check_served, conversation, form, has_constraint, wanted
from api.bodies import (
    ChatBody,
    CompletionBody,
    chat_body,
    completion_body,
    digest,
    single_prompt,
)
from api.headers import treatment
from api.service import ServedPool, Service
from api.transcript import transcript_of
from pipeline.errors import InvalidRequest
from pipeline.ids import new_request_id
from pipeline.protocol import BackendInput, Request, RoutingHints
from pipeline.routing import TIER_OF_LANE, lane_of

INLINE_BYTES = (
    16_384  # longer bodies are tokenized in a thread, as grammars are checked, so that they do not hold up the streams
)


def generation_routes(service: Service) -> APIRouter:
    """The routes that make text."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = chat_body(raw)
        pool = served_pool(service, http, body.model)

        def prepare(request_id: str) -> BackendInput:
            check_served(body, pool.engine)
            return pool.preprocessor.chat(request_id, conversation(body), wanted(body), form(body, told_tier(body)))

        return await answer(service, pool, http, body, "chat.completion", prepare, len(raw))

    @router.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = completion_body(raw)
        pool = served_pool(service, http, body.model)

        def prepare(request_id: str) -> BackendInput:
            check_served(body, pool.engine)
            return pool.preprocessor.completion(
                request_id, single_prompt(body), wanted(body), form(body, told_tier(body))
            )

        return await answer(service, pool, http, body, "text_completion", prepare, len(raw))

    return router


async def answer(
    service: Service,
    pool: ServedPool,
    http: HttpRequest,
    body: ChatBody | CompletionBody,
    kind: str,
    prepare: Callable[[str], BackendInput],
    body_bytes: int,
) -> Answer:
    """A checked body's request, to be served as its kind is. `prepare`: makes the engine's input of a request's id."""
    treat = treatment(http.headers)
    request_id = new_request_id(pool.name)
    is_light = body_bytes <= INLINE_BYTES and not has_constraint(body)
    ready = prepare(request_id) if is_light else await asyncio.to_thread(prepare, request_id)
    if body.model != pool.name:
        ready = under_lora(ready, body.model)
    lane = lane_of(body.priority, body.service_tier)
    options = body.stream_options
    request = Request(
        id=request_id,
        kind=kind,
        created_s=int(time.time()),
        input=ready,
        include_usage=options is not None and bool(options.include_usage),
        resumable=treat.resumable,
        owner=caller_of(http),
    )
    key = treat.idempotency_key
    opening = functools.partial(
        pool.client.submit, request, priority=lane, deadline_s=treat.timeout_s, linger_s=treat.linger_s,
        idempotency_key=idempotency_key(request.owner, request.kind, key) if key else "", body_digest=digest(body) if key else "",
    )  # fmt: skip
    if not body.stream:
        return WholeAnswer(service, pool, opening)
    tokenizer, shape = pool.preprocessor.tokenizer, service.shapes[kind]
    return StreamedAnswer(
        service, pool, opening, lambda asked: transcript_of(tokenizer, asked, shape, has_ids=treat.resumable)
    )


def told_tier(body: ChatBody | CompletionBody) -> str:
    """The service tier that the answer tells; empty where none was asked for."""
    return "" if body.service_tier is None else TIER_OF_LANE[lane_of(body.priority, body.service_tier)]


def under_lora(ready: BackendInput, name: str) -> BackendInput:
    """The same request for an adapter of the pool's model, which is what the answer says it came from."""
    return replace(ready, model=name, routing=replace(ready.routing or RoutingHints(), lora_name=name))


def idempotency_key(owner: str, kind: str, key: str) -> str:
    """A client's key as the queue knows it: nobody can name the one of another caller or route."""
    return hashlib.blake2b("\0".join((owner, kind, key)).encode(), digest_size=16).hexdigest()


async def admitted_body(service: Service, http: HttpRequest) -> bytes:
    """The body of a request that may be sent now. Raises Draining, InvalidRequest."""
    service.drain.check()
    return await read_body(http, service.settings.body_limit_bytes)


def served_pool(service: Service, http: HttpRequest, model: str) -> ServedPool:
    """The pool of a model that the caller may use. Raises ModelNotFound."""
    return service.pool(model)


async def read_body(http: HttpRequest, limit_bytes: int) -> bytes:
    """The body, if it is JSON by its headers and not too large; a declared length is believed before anything is read.

    Raises InvalidRequest (unsupported_media_type, body_too_large).
    """
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidRequest(f"content type {kind[:100]!r} is not application/json", code="unsupported_media_type")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("compressed bodies are not supported", code="unsupported_media_type")
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    parts: list[bytes] = []
    size = 0
    async for part in http.stream():
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"the body has more than {limit_bytes} bytes", code="body_too_large")
