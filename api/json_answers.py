"""Answers that are one JSON value, and pages of lists as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response


def json_answer(value: Any, status: int = 200) -> Response:
    """A value as the whole answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def page_of(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list; the ids are empty where it is."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": has_more,
    }
