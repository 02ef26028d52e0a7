"""`/v1/batches`: made here, run by batch workers."""

from __future__ import annotations

import structlog
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.access import caller_of
from api.generation import admitted_body, idempotency_key
from api.guard import caller
from api.headers import treatment
from api.json_answers import json_answer, page_of
from api.queries import READ, number
from api.service import Service
from pipeline.batches.creating import batch_body
from pipeline.batches.record import IDS, shown
from pipeline.errors import InvalidRequest

KIND = "batch"
MOST_LISTED, LISTED = 100, 20

log = structlog.get_logger("baton.api")


def batch_routes(service: Service) -> APIRouter:
    """The routes of batches."""
    router = APIRouter()

    @router.post("/v1/batches")
    async def create(http: HttpRequest) -> Response:
        """Make a batch of a file."""
        body = batch_body(await admitted_body(service, http))
        who, key = caller(http), treatment(http.headers).idempotency_key
        models = " ".join(who.key.models) if who.key is not None else ""
        named = idempotency_key(who.owner, KIND, key) if key else ""
        record = await service.all_batches.create(body, owner=who.owner, models=models, idempotency_key=named)
        log.info("batch made", batch_id=record.id, file_id=record.input_file_id, endpoint=record.endpoint)
        return json_answer(shown(record))

    @router.api_route("/v1/batches", methods=READ)
    async def listed(http: HttpRequest) -> Response:
        """The caller's batches, a page at a time, the newest first."""
        query = http.query_params
        limit, after = number(query, "limit", LISTED, least=1, most=MOST_LISTED), query.get("after", "")
        if after and not IDS.has(after):
            raise InvalidRequest(f"after: {after[:100]!r} is not the id of a batch", param="after")
        found, more = await service.all_batches.page(caller_of(http), after=after, limit=limit)
        return json_answer(page_of([shown(record) for record in found], more))

    @router.api_route("/v1/batches/{batch_id}", methods=READ)
    async def show(http: HttpRequest, batch_id: str) -> Response:
        """A batch as it stands."""
        return json_answer(shown(await service.all_batches.find(batch_id, caller_of(http))))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(http: HttpRequest, batch_id: str) -> Response:
        """End a batch; what has been answered is kept."""
        return json_answer(shown(await service.all_batches.cancel(batch_id, caller_of(http))))

    return router
