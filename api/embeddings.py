"""`/v1/embeddings`: a body becomes the requests of one or several tasks, their vectors become one answer (`embedding_answer.py`)."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import Meta
from starlette.responses import Response

from api.bodies import decoded, digest
from api.embedding_answer import EmbeddingAnswer, Part
from api.generation import INLINE_BYTES, admitted_body, idempotency_key, lane_for, served_pool
from api.guard import caller
from api.headers import treatment
from api.service import ServedPool, Service
from pipeline.embeddings import KIND, MOST_INPUTS, Offer, embedding_request, parts_of
from pipeline.errors import InvalidRequest
from pipeline.features import EMBEDDINGS, is_served
from pipeline.ids import new_request_id
from pipeline.queue import EMBED

Input = str | list[str | int | list[int]]


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The body of /v1/embeddings. `input`: a text, token ids, or a list of several of one of these."""

    model: str
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    service_tier: Literal["auto", "default", "scale", "priority", "flex", "batch"] | None = None


_decoder = msgspec.json.Decoder(EmbeddingBody)


def embedding_routes(service: Service) -> APIRouter:
    """The route that makes vectors."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = embedding_body(raw)
        pool = served_pool(service, http, body.model)
        offer = offered(pool, body.model)
        dimensions = dimensions_of(body, offer)
        named = several(body.input)
        prepare = functools.partial(_token_ids, pool, named)
        sequences = prepare() if len(raw) <= INLINE_BYTES else await asyncio.to_thread(prepare)
        if service.rates is not None:
            await service.rates.count_tokens(http, sum(map(len, sequences)))
        parts = _parts(pool, offer, http, body, sequences, dimensions)
        return EmbeddingAnswer(service, pool, parts, as_base64=body.encoding_format == "base64")

    return router


def embedding_body(raw: bytes) -> EmbeddingBody:
    """Decode and check the body. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: EmbeddingBody = decoded(_decoder, raw)
    return body


def several(given: Input) -> list[tuple[str, str | list[int]]]:
    """Each input with its path in the body. Raises InvalidRequest for none, for too many, and for a mixture."""
    if isinstance(given, str) or (given and type(given[0]) is int):
        return [("input", given if isinstance(given, str) else _ids(given))]
    if not given:
        raise InvalidRequest("input is empty: there is nothing to embed", param="input")
    if len(given) > MOST_INPUTS:
        raise InvalidRequest(f"input has {len(given)} inputs, at most {MOST_INPUTS} are taken", param="input")
    kind = type(given[0])
    found: list[tuple[str, str | list[int]]] = []
    for position, one in enumerate(given):
        if type(one) is not kind or isinstance(one, int):
            raise InvalidRequest("input is a list of texts or of lists of token ids", param=f"input[{position}]")
        found.append((f"input[{position}]", one))
    return found


def _ids(given: list[str | int | list[int]]) -> list[int]:
    for position, one in enumerate(given):
        if not isinstance(one, int):
            raise InvalidRequest("input is a list of token ids, this is none", param=f"input[{position}]")
    return [one for one in given if isinstance(one, int)]


def offered(pool: ServedPool, model: str) -> Offer:
    """What the pool gives. Raises InvalidRequest where it makes no embeddings, saying why."""
    if not is_served(pool.engine, EMBEDDINGS):
        why = f"its engine, {pool.engine}, does not serve them"
    elif pool.embeddings is None:
        why = f"pools.{pool.name}.embeddings is false"
    else:
        return pool.embeddings
    raise InvalidRequest(f"model {model!r} makes no embeddings: {why}", param="model", code="unsupported_parameter")


def dimensions_of(body: EmbeddingBody, offer: Offer) -> int | None:
    """How many numbers a vector is cut to; None: it is not. Raises InvalidRequest."""
    asked = body.dimensions
    if asked is None or asked == offer.width:
        return None
    if not offer.is_matryoshka:
        raise InvalidRequest(
            f"model {body.model!r} makes vectors of one length"
            f"{f', {offer.width}' if offer.width else ''}: it does not support dimensions (pools.<name>.matryoshka)",
            param="dimensions",
            code="unsupported_parameter",
        )
    if offer.width is not None and asked > offer.width:
        raise InvalidRequest(
            f"model {body.model!r} makes vectors of {offer.width} numbers, {asked} are asked for", param="dimensions"
        )
    return asked


def _token_ids(pool: ServedPool, named: list[tuple[str, str | list[int]]]) -> list[list[int]]:
    return [pool.preprocessor.embedding(one, param) for param, one in named]


def _parts(
    pool: ServedPool,
    offer: Offer,
    http: HttpRequest,
    body: EmbeddingBody,
    sequences: list[list[int]],
    dimensions: int | None,
) -> list[Part]:
    """The tasks of one request and how each is submitted. Under a key each has one of its own, so the whole can be sent again."""
    treat, who, created_s = treatment(http.headers), caller(http), int(time.time())
    lane = lane_for(http, body.priority, body.service_tier)
    key, body_digest = treat.idempotency_key, digest(body) if treat.idempotency_key else ""
    parts: list[Part] = []
    for number, part in enumerate(parts_of([len(tokens) for tokens in sequences], offer.part_inputs)):
        request = embedding_request(
            new_request_id(pool.name), pool.name, sequences[part.start : part.stop], dimensions, created_s=created_s,
            owner=who.owner, resumable=treat.resumable,
        )  # fmt: skip
        opening = functools.partial(
            pool.client.submit, request, stage=EMBED, priority=lane,
            deadline_s=treat.timeout_s, linger_s=treat.linger_s, body_digest=body_digest,
            idempotency_key=idempotency_key(who.owner, f"{KIND} {number}", key) if key else "",
        )  # fmt: skip
        parts.append(Part(request, len(part), opening))
    return parts
