"""`/v1/streams/{id}` and `/v1/requests/{id}`: what becomes of a request after its first connection, on any replica."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.access import Found, caller_of, find_request, may_access
from api.answers import StreamedAnswer
from api.json_answers import json_answer
from api.queries import READ
from api.service import Service
from pipeline.errors import InvalidRequest, RequestNotFound
from pipeline.logprobs import prompt_record_bytes, record_bytes, records_between
from pipeline.protocol import Timeline
from pipeline.stream import TokenChunk, Usage
from pipeline.surface.collected import Collected
from pipeline.surface.event_ids import LAST_EVENT_ID, Place, read_event_id
from pipeline.surface.logprobs import is_long
from pipeline.surface.shape import Shape
from pipeline.surface.shapes.openai import OpenAIShape, usage_fields
from pipeline.surface.transcript import NumberedTranscript, transcript_of

READABLE = ("chat.completion", "text_completion", "message")  # kinds whose streams are read here
INLINE_TOKENS = 16_384  # more are made text again in a thread, so that they do not hold up the streams


def request_routes(service: Service) -> APIRouter:
    """The routes that take a request's id."""
    router = APIRouter()

    @router.api_route("/v1/streams/{request_id}", methods=READ)
    async def stream(http: HttpRequest, request_id: str, last_event_id: str | None = None) -> Response:
        """The events behind the last one that the reader has; a header wins over the query, as it is the newer one of the two."""
        service.drain.check()
        found = await find_request(service, http, request_id)
        if found.request.task is not None:
            raise InvalidRequest(f"{found.request.id} generates nothing: it has no stream of events", param="id")
        if found.request.kind not in READABLE:
            raise InvalidRequest(
                f"the stream of a {found.request.kind} has no event ids: read it where it was asked for", param="id"
            )
        if http.method == "HEAD":
            return Response(media_type="text/event-stream")
        given = http.headers.get(LAST_EVENT_ID, last_event_id)
        shape = service.shapes.get(found.request.kind, service.openai)
        if not isinstance(shape, OpenAIShape):
            return _replay(service, found, shape, given)
        if given is None:
            return _stream(service, found, Place.at_start(found.request), waits=True)
        place = read_event_id(given, found.request, found.standing.log)
        make = functools.partial(_stream, service, found, place, waits=False)
        return make() if sum(place.tokens) <= INLINE_TOKENS else await asyncio.to_thread(make)

    @router.api_route("/v1/requests/{request_id}", methods=READ)
    async def show(http: HttpRequest, request_id: str) -> Response:
        """Where a request stands, and its text so far."""
        found = await find_request(service, http, request_id)
        inline = sum(map(len, found.standing.log.tokens)) <= INLINE_TOKENS and not is_long(found.request)
        make = functools.partial(_record, found, service.openai, await _prompt_logprobs(found))
        return json_answer(make() if inline else await asyncio.to_thread(make))

    @router.post("/v1/requests/{request_id}/cancel")
    async def cancel(http: HttpRequest, request_id: str) -> Response:
        """End a request; one that has ended stays what it is."""
        found = await find_request(service, http, request_id, for_admin=True)
        who = "its client" if may_access(found.request, caller_of(http)) else "an administrator"
        state, reason = await found.pool.client.queue.cancel(found.request.id, f"cancelled by {who}")
        if state == "gone":
            raise RequestNotFound(found.request.id)
        return json_answer({"id": found.request.id, "object": "request", "state": state, "reason": reason})

    return router


def _stream(service: Service, found: Found, place: Place, *, waits: bool) -> StreamedAnswer:
    tokenizer, log = found.pool.preprocessor.tokenizer, found.standing.log
    transcript = NumberedTranscript(tokenizer, found.request, service.openai, place, log)
    opening = functools.partial(found.pool.client.attach, found.request.id, found=found.standing, start=place.tokens)
    return StreamedAnswer(service, found.pool, opening, lambda _: transcript, waits=waits)


def _replay(service: Service, found: Found, shape: Shape, given: str | None) -> StreamedAnswer:
    """Events that have no ids, from the start."""
    request, tokenizer = found.request, found.pool.preprocessor.tokenizer
    if given is not None:
        raise InvalidRequest(
            f"the events of a {request.kind} have no ids: read them from the start, without {LAST_EVENT_ID}",
            param=LAST_EVENT_ID,
        )
    opening = functools.partial(found.pool.client.attach, request.id, found=found.standing)
    return StreamedAnswer(service, found.pool, opening, lambda _: transcript_of(tokenizer, request, shape))


async def _prompt_logprobs(found: Found) -> bytes | None:
    """The records of its prompt, where they are asked for and are there: with the first token, or the end."""
    standing = found.standing
    if not prompt_record_bytes(found.request.input) or not (any(standing.log.tokens) or standing.has_ended):
        return None
    return await found.pool.client.queue.prompt_logprobs(found.request.id)


def _record(found: Found, shape: OpenAIShape, prompt_logprobs: bytes | None) -> dict[str, Any]:
    """A request as `/v1/requests/{id}` shows it."""
    request, standing = found.request, found.standing
    completion = standing.completion_tokens if standing.has_ended else sum(map(len, standing.log.tokens))
    return {
        "id": request.id,
        "object": "request",
        "kind": request.kind,
        "model": request.input.model,
        "created": request.created_s,
        "state": standing.state,
        "reason": standing.reason,
        "stage": standing.stage,
        "lane": standing.lane,
        "attempts": standing.attempts,
        "resumable": request.resumable,
        "timeline": {name: getattr(standing.timeline, name) or None for name in Timeline.__struct_fields__},
        "usage": usage_fields(Usage(standing.prompt_tokens, completion, standing.cached_tokens)),
        **_answer(found, shape, prompt_logprobs),
    }


def _answer(found: Found, shape: OpenAIShape, prompt_logprobs: bytes | None) -> dict[str, Any]:
    """Each choice with what it says so far: what is certain, and all of it where the choice has ended."""
    if found.request.task is not None:  # it makes no text
        return {"choices": []}
    request, log, records = found.request, found.standing.log, found.standing.logprobs
    collected, size = Collected(found.pool.preprocessor.tokenizer, request), record_bytes(request.input)
    for choice, (tokens, reason) in enumerate(zip(log.tokens, log.finished, strict=True)):
        own = records_between(records[choice], 0, len(tokens), size)
        collected.push([TokenChunk(choice, 0, tokens, reason, own, prompt_logprobs)])
    said = collected.all()
    return {"choices": shape.choices(request, said), **shape.of_prompt(request, said)}
