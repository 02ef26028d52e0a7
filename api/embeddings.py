"""`/v1/embeddings`: a body becomes the requests of one or several tasks, their vectors become one answer (`embedding_answer.py`)."""

from __future__ import annotations

import asyncio
import functools
import time

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.edge import label_of
from api.embedding_answer import EmbeddingAnswer, Part
from api.generation import INLINE_BYTES, admitted_body, idempotency_key, lane_for, served_pool
from api.guard import caller
from api.headers import treatment
from api.service import Service
from pipeline.embeddings import KIND, Offer, embedding_request, parts_of
from pipeline.ids import new_request_id
from pipeline.labels import with_label
from pipeline.pools import ServedPool
from pipeline.queue import EMBED
from pipeline.surface.bodies import digest
from pipeline.surface.embedding_bodies import EmbeddingBody, dimensions_of, embedding_body, offered, several, token_ids


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
        prepare = functools.partial(token_ids, pool, named)
        sequences = prepare() if len(raw) <= INLINE_BYTES else await asyncio.to_thread(prepare)
        if service.rates is not None:
            await service.rates.count_tokens(http, sum(map(len, sequences)))
        parts = _parts(pool, offer, http, body, sequences, dimensions)
        return EmbeddingAnswer(service, pool, parts, as_base64=body.encoding_format == "base64")

    return router


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
        request = with_label(request, label_of(http))
        opening = functools.partial(
            pool.client.submit, request, stage=EMBED, priority=lane,
            deadline_s=treat.timeout_s, linger_s=treat.linger_s, body_digest=body_digest,
            max_held=0 if number else who.max_held,  # what has begun is not refused: it would never fit
            idempotency_key=idempotency_key(who.owner, f"{KIND} {number}", key) if key else "",
        )  # fmt: skip
        parts.append(Part(request, len(part), opening))
    return parts
