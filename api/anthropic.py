"""`/v1/messages` and `/v1/messages/count_tokens`: what Anthropic's clients send, served as the chats that they are."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from api.generation import INLINE_BYTES, admitted_body, answer, served_pool
from api.service import Service
from pipeline.protocol import BackendInput
from pipeline.surface.anthropic_bodies import SCHEMA_FIELD, count_body, message_body
from pipeline.surface.anthropic_chats import chat_of
from pipeline.surface.anthropic_errors import MESSAGES_PATH
from pipeline.surface.asks import conversation, form
from pipeline.surface.inputs import chat_input

KIND = "message"


def anthropic_routes(service: Service) -> APIRouter:
    """The routes of Anthropic's clients."""
    router = APIRouter()

    @router.post(MESSAGES_PATH)
    async def messages(http: HttpRequest) -> Response:
        raw = await admitted_body(service, http)
        body = message_body(raw)
        pool = served_pool(service, http, body.model)
        chat = chat_of(body)

        def prepare(tier: str) -> list[BackendInput]:
            return [chat_input(pool, chat, tier, SCHEMA_FIELD)]

        return await answer(service, pool, http, chat, KIND, prepare, len(raw))

    @router.post(f"{MESSAGES_PATH}/count_tokens")
    async def count_tokens(http: HttpRequest) -> Response:
        """The tokens of the prompt, also where they are more than the model takes; nothing is queued."""
        raw = await admitted_body(service, http)
        body = count_body(raw)
        pool = served_pool(service, http, body.model)
        chat = chat_of(body)

        def count() -> int:
            return len(pool.preprocessor.chat_prompt(conversation(chat), form(chat, "")))

        tokens = count() if len(raw) <= INLINE_BYTES else await asyncio.to_thread(count)
        return Response(msgspec.json.encode({"input_tokens": tokens}), media_type="application/json")

    return router
