"""`/v1/responses`: responses are made, read again, gone on from, cancelled and deleted, on any replica."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.access import Found, find_request
from api.answers import StreamedAnswer
from api.edge import REQUEST_ID, label_of
from api.generation import INLINE_BYTES, admitted_body, idempotency_key, lane_for, served_pool
from api.guard import caller
from api.headers import Treatment, treatment
from api.json_answers import json_answer, page_of
from api.queries import READ, flag, number, word
from api.rate_limits import most_tokens
from api.requests import INLINE_TOKENS
from api.response_reading import WholeResponse, response_of
from api.service import Service
from pipeline.answer_form import form_of
from pipeline.errors import InvalidRequest, RequestNotFound
from pipeline.ids import new_request_id
from pipeline.labels import with_label
from pipeline.pools import ServedPool
from pipeline.protocol import Request
from pipeline.surface.bodies import digest
from pipeline.surface.inputs import response_input
from pipeline.surface.response_transcript import ResponseTranscript
from pipeline.surface.responses_asks import may_have_grammar
from pipeline.surface.responses_bodies import ResponseBody, response_body
from pipeline.surface.shapes.response_items import INCOMPLETE
from pipeline.surface.shapes.responses import ALL, ResponseEvents, ResponseShape, response_id

KIND = "response"
MOST_LISTED, LISTED = 100, 20

log = structlog.get_logger("baton.api")


def response_routes(service: Service) -> APIRouter:
    """The routes of responses."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def create(http: HttpRequest) -> Response:
        """Make a response: whole, as a stream, or in the background."""
        raw = await admitted_body(service, http)
        body = response_body(raw)
        pool = served_pool(service, http, body.model)
        lane = lane_for(http, body.priority, body.service_tier)
        before = await _conversation_before(service, http, body.previous_response_id)
        request_id = new_request_id(pool.name)
        prepare = functools.partial(response_input, pool, request_id, body, before, lane)
        is_light = len(raw) <= INLINE_BYTES and not before and not may_have_grammar(body)
        ready = prepare() if is_light else await asyncio.to_thread(prepare)
        if service.rates is not None:
            await service.rates.count_tokens(http, most_tokens(ready))
        treat = treatment(http.headers, streams=bool(body.stream or body.background))
        request = Request(
            id=request_id,
            kind=KIND,
            created_s=int(time.time()),
            input=ready,
            resumable=treat.resumable or bool(body.background),
            owner=caller(http).owner,
        )
        request = with_label(request, label_of(http))
        if body.background and not body.stream:
            return await _in_background(service, pool, http, body, request, treat, lane)
        return _answer(service, pool, http, body, request, treat, lane)

    @router.api_route("/v1/responses/{response_id}", methods=READ)
    async def show(http: HttpRequest, response_id: str) -> Response:
        """A response as it stands, or its events from the start or behind `starting_after`."""
        found = await find_response(service, http, response_id)
        if not flag(http.query_params, "stream"):
            if "starting_after" in http.query_params:
                raise InvalidRequest("starting_after is only allowed when stream is true", param="starting_after")
            return json_answer(await _shown(found))
        service.drain.check()
        after = number(http.query_params, "starting_after", -1, least=0)
        if http.method == "HEAD":
            return Response(media_type="text/event-stream")
        tokenizer, shape = found.pool.preprocessor.tokenizer, ResponseShape(after)
        opening = functools.partial(found.pool.client.attach, found.request.id, found=found.standing)
        transcript = functools.partial(ResponseTranscript, tokenizer, shape=shape)
        return StreamedAnswer(service, found.pool, opening, transcript, waits=False)

    @router.api_route("/v1/responses/{response_id}/input_items", methods=READ)
    async def input_items(http: HttpRequest, response_id: str) -> Response:
        """What a response was asked, with the conversation before it."""
        found = await find_response(service, http, response_id)
        query = http.query_params
        newest_first = word(query, "order", ("desc", "asc")) == "desc"
        limit = number(query, "limit", LISTED, least=1, most=MOST_LISTED)
        return json_answer(page(form_of(found.request).body["input"], newest_first, query.get("after"), limit))

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(http: HttpRequest, response_id: str) -> Response:
        """End a response of the background; one that has ended stays what it is."""
        found = await find_response(service, http, response_id)
        if not form_of(found.request).body["background"]:
            raise InvalidRequest(
                f"{response_id[:100]}: only a response of the background is cancelled, others end with their connection",
                param="id",
            )
        await found.pool.client.queue.cancel(found.request.id, "cancelled by its client")
        return json_answer(await _shown(await find_response(service, http, response_id)))

    @router.delete("/v1/responses/{response_id}")
    async def delete(http: HttpRequest, response_id: str) -> Response:
        """Forget a response; one that is not complete is cancelled first."""
        found = await find_response(service, http, response_id)
        queue, request_id = found.pool.client.queue, found.request.id
        await queue.cancel(request_id, "deleted by its client")
        await queue.erase(request_id)
        return json_answer({"id": answer_id(found), "object": "response", "deleted": True})

    return router


async def find_response(service: Service, http: HttpRequest, given_id: str) -> Found:
    """A response that the caller may see. Raises RequestNotFound, also for what is no response or was not to be stored."""
    found = await find_request(service, http, given_id)
    if found.request.kind != KIND or not form_of(found.request).body["store"]:
        raise RequestNotFound(given_id)
    return found


def answer_id(found: Found) -> str:
    """The id of a response that was found."""
    return response_id(found.request)


def page(items: Sequence[dict[str, Any]], newest_first: bool, after: str | None, limit: int) -> dict[str, Any]:
    """A part of a list, as OpenAI pages: behind the item `after`. Raises InvalidRequest where there is no such item."""
    ordered = list(reversed(items)) if newest_first else list(items)
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after: there is no item {after[:100]!r}", param="after")
        ordered = ordered[places[0] + 1 :]
    return page_of(ordered[:limit], len(ordered) > limit)


async def _conversation_before(service: Service, http: HttpRequest, previous_id: str | None) -> list[dict[str, Any]]:
    """Input and output of the response that is gone on from, as items. Raises InvalidRequest where there is none, or no whole one."""
    if previous_id is None:
        return []
    try:
        found = await find_response(service, http, previous_id)
    except RequestNotFound as error:
        code, param = "previous_response_not_found", "previous_response_id"
        raise InvalidRequest(f"previous response: {error}", param=param, code=code) from error
    finally:
        http.scope.pop(REQUEST_ID, None)  # it is not the request behind this answer
    previous = await _shown(found)
    output, status = previous["output"], previous["status"]
    if found.standing.state != "done":
        raise InvalidRequest(
            f"previous response {previous_id[:100]} is {status}: only one that is complete can be gone on from",
            param="previous_response_id",
        )
    if output[-1]["type"] == "function_call" and output[-1]["status"] == INCOMPLETE:
        raise InvalidRequest(
            f"previous response {previous_id[:100]} ended within a call, whose arguments are torn: it cannot be gone on from",
            param="previous_response_id",
        )
    return [*form_of(found.request).body["input"], *output]


async def _shown(found: Found) -> dict[str, Any]:
    is_short = sum(map(len, found.standing.log.tokens)) <= INLINE_TOKENS
    return response_of(found) if is_short else await asyncio.to_thread(response_of, found)


def _answer(
    service: Service,
    pool: ServedPool,
    http: HttpRequest,
    body: ResponseBody,
    request: Request,
    treat: Treatment,
    lane: str,
) -> StreamedAnswer | WholeResponse:
    """The answer to who waits for it. In the background it goes on without its reader."""
    key, body_digest = _keyed(body, request, treat)
    opening = functools.partial(
        pool.client.submit,
        request,
        priority=lane,
        max_held=caller(http).max_held,
        deadline_s=treat.timeout_s,
        linger_s=None if body.background else treat.linger_s,
        idempotency_key=key,
        body_digest=body_digest,
    )
    if not body.stream:
        return WholeResponse(service, pool, opening)
    transcript = functools.partial(ResponseTranscript, pool.preprocessor.tokenizer, shape=ResponseShape())
    return StreamedAnswer(service, pool, opening, transcript, waits=not body.background)


async def _in_background(
    service: Service,
    pool: ServedPool,
    http: HttpRequest,
    body: ResponseBody,
    request: Request,
    treat: Treatment,
    lane: str,
) -> Response:
    """Nobody waits for it: it is admitted, and answered as it stands."""
    longest_s = pool.client.deadline_s(lane)
    key, body_digest = _keyed(body, request, treat)
    admitted = await pool.client.admit(
        request,
        priority=lane,
        deadline_s=min(treat.timeout_s or longest_s, longest_s),
        idempotency_key=key,
        body_digest=body_digest,
        max_held=caller(http).max_held,
    )
    http.scope[REQUEST_ID] = admitted
    log.info("request goes on in the background", request_id=admitted, prompt_tokens=len(request.input.token_ids))
    if admitted != request.id:  # its idempotency key stands for an earlier one
        return json_answer(await _shown(await find_response(service, http, admitted)))
    return json_answer(ResponseEvents(request, ALL).response(None))


def _keyed(body: ResponseBody, request: Request, treat: Treatment) -> tuple[str, str]:
    """The idempotency key and what it stands for; empty where there is none."""
    if not treat.idempotency_key:
        return "", ""
    return idempotency_key(request.owner, request.kind, treat.idempotency_key), digest(body)
