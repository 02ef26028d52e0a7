"""`/v1/chat/completions` and `/v1/completions`: a body becomes a `Request`, a `Request` becomes an answer."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Sequence

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.answers import Opening, StreamedAnswer, WholeAnswer
from api.batched import BatchedAnswer, BatchedStream
from api.edge import label_of
from api.guard import caller, check_model
from api.headers import RESUMABLE, Treatment, treatment
from api.rate_limits import most_tokens
from api.service import Service
from pipeline.errors import BodyTimeout, InvalidRequest
from pipeline.labels import with_label
from pipeline.pools import ServedPool
from pipeline.protocol import BackendInput, Request
from pipeline.routing import TIER_OF_LANE, lane_of
from pipeline.surface.asks import check_prompt_logprobs, may_have_grammar
from pipeline.surface.bodies import ChatBody, CompletionBody, chat_body, completion_body, digest
from pipeline.surface.inputs import inputs_of
from pipeline.surface.transcript import transcript_of

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

        prepare = functools.partial(inputs_of, pool, body)
        return await answer(service, pool, http, body, "chat.completion", prepare, len(raw))

    @router.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = completion_body(raw)
        pool = served_pool(service, http, body.model)

        prepare = functools.partial(inputs_of, pool, body)
        return await answer(service, pool, http, body, "text_completion", prepare, len(raw))

    return router


async def answer(
    service: Service,
    pool: ServedPool,
    http: HttpRequest,
    body: ChatBody | CompletionBody,
    kind: str,
    prepare: Callable[[str], list[BackendInput]],
    body_bytes: int,
) -> Response:
    """A checked body, to be served as its kind is. `prepare`: the input of each prompt, given the service tier that is told."""
    lane = lane_for(http, body.priority, body.service_tier)
    tier = "" if body.service_tier is None else TIER_OF_LANE[lane]  # told only where one was asked for
    is_light = body_bytes <= INLINE_BYTES and not may_have_grammar(body)
    inputs = prepare(tier) if is_light else await asyncio.to_thread(prepare, tier)
    _check_count(len(inputs), caller(http).max_held)
    check_prompt_logprobs(body, inputs, service.settings.max_prompt_logprobs)
    if service.rates is not None:
        await service.rates.count_tokens(http, sum(map(most_tokens, inputs)))
    treat = treatment(http.headers, streams=bool(body.stream))
    if len(inputs) > 1 and body.stream and treat.resumable:
        raise InvalidRequest(
            f"the stream of several prompts is one of several requests and cannot be resumed: leave out {RESUMABLE}, or send the prompts "
            "one by one",
            param=RESUMABLE,
        )
    openings = _openings(pool, http, body, kind, lane, treat, inputs)
    if len(openings) > 1:
        return (BatchedStream if body.stream else BatchedAnswer)(service, pool, openings)
    if not body.stream:
        return WholeAnswer(service, pool, openings[0])
    tokenizer, shape = pool.preprocessor.tokenizer, service.shapes[kind]
    return StreamedAnswer(
        service, pool, openings[0], lambda asked: transcript_of(tokenizer, asked, shape, has_ids=treat.resumable)
    )


def _check_count(prompts: int, most: int) -> None:
    """Raise InvalidRequest for more prompts than the caller may ever have at once. `most`: 0 for no limit."""
    if 0 < most < prompts:
        raise InvalidRequest(
            f"{prompts} prompts are {prompts} requests at once, and the key may have {most}: send fewer at a time",
            param="prompt",
        )


def _openings(
    pool: ServedPool,
    http: HttpRequest,
    body: ChatBody | CompletionBody,
    kind: str,
    lane: str,
    treat: Treatment,
    inputs: Sequence[BackendInput],
) -> list[Opening]:
    """What submits each request. Under a key each has one of its own, so that the whole can be sent again."""
    who, key, options, created_s = caller(http), treat.idempotency_key, body.stream_options, int(time.time())
    body_digest = digest(body) if key else ""
    openings: list[Opening] = []
    for number, ready in enumerate(inputs):
        request = Request(
            id=ready.request_id, kind=kind, created_s=created_s, input=ready, owner=who.owner, resumable=treat.resumable,
            include_usage=options is not None and bool(options.include_usage),
        )  # fmt: skip
        request = with_label(request, label_of(http))
        named = idempotency_key(who.owner, f"{kind} {number}" if number else kind, key) if key else ""
        opening = functools.partial(
            pool.client.submit, request, priority=lane, deadline_s=treat.timeout_s, linger_s=treat.linger_s,
            max_held=who.max_held, idempotency_key=named, body_digest=body_digest,
        )  # fmt: skip
        openings.append(opening)
    return openings


def lane_for(http: HttpRequest, priority: int | None, service_tier: str | None) -> str:
    """The lane that a body asks for and its caller may have; the caller's own where it asks for none."""
    says_lane = priority is not None or service_tier not in (None, "auto")
    return caller(http).lane(lane_of(priority, service_tier) if says_lane else None)


def idempotency_key(owner: str, kind: str, key: str) -> str:
    """A client's key as the queue knows it: nobody can name the one of another caller or route."""
    return hashlib.blake2b("\0".join((owner, kind, key)).encode(), digest_size=16).hexdigest()


async def admitted_body(service: Service, http: HttpRequest) -> bytes:
    """The body of a request that the caller may send now; nothing is read of one that comes too soon.

    Raises Draining, RateLimited, RedisUnavailable, BodyTimeout, InvalidRequest.
    """
    service.drain.check()
    if service.rates is not None:
        await service.rates.count_request(http)
    return await read_body(http, service.settings.body_limit_bytes, service.settings.body_timeout_s)


def served_pool(service: Service, http: HttpRequest, model: str) -> ServedPool:
    """The pool of a model that the caller may use. Raises NotAllowed, ModelNotFound."""
    check_model(http, model)
    return service.pool(model)


async def read_body(http: HttpRequest, limit_bytes: int, limit_s: float) -> bytes:
    """The body, if it is JSON by its headers and not too large; a declared length is believed before anything is read.

    Raises InvalidRequest (unsupported_media_type, body_too_large), BodyTimeout.
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
    try:
        async with asyncio.timeout(limit_s):
            async for part in http.stream():
                size += len(part)
                if size > limit_bytes:
                    raise _too_large(limit_bytes)
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"of the body {size} bytes came in {limit_s:g} s, and it is not whole") from error
    return b"".join(parts)


def _too_large(limit_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"the body has more than {limit_bytes} bytes", code="body_too_large")
