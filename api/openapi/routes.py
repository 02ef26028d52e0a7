"""`/openapi.json`. It is open, as it tells nothing of this server but its version and whether a key is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from api.guard import OPENAPI_PATH
from api.openapi.page import page
from api.queries import READ


def page_routes(needs_key: Callable[[], bool], metrics_need_key: bool) -> APIRouter:
    """The page. `needs_key`: whether one is needed now, which may begin while the process runs."""
    router = APIRouter()

    @functools.cache
    def written(needs: bool) -> bytes:
        return msgspec.json.encode(page(needs_key=needs, metrics_need_key=metrics_need_key))

    @router.api_route(OPENAPI_PATH, methods=READ)
    async def openapi() -> Response:
        return Response(written(needs_key()), media_type="application/json")

    return router
