"""Errors as Anthropic's clients know them: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

The statuses are those of the one table, but for a full queue: Anthropic's clients know it as 529. The type follows from the status.
"""

from __future__ import annotations

import msgspec

from pipeline.errors import BatonError, InvalidRequest
from pipeline.surface.errors import Dialect, Row, bounded, row_of

MESSAGES_PATH = "/v1/messages"

OVERLOADED_STATUS = 529

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}
_OURS = {499: "api_error"}  # no fault of what was asked


def status_of(error: BatonError) -> int:
    """The status of an error on these routes."""
    return status_of_row(row_of(error))


def status_of_row(row: Row) -> int:
    """The same of its row in the table."""
    return OVERLOADED_STATUS if row.type == "overloaded_error" else row.status


def type_of(error: BatonError) -> str:
    """Anthropic's word for it."""
    status = status_of(error)
    return TYPES.get(status) or _OURS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")


def error_body(error: BatonError, x_request_id: str = "") -> bytes:
    """The body of an error, also the data of an error event, which does not know the answer's label. What is wrong is named in the message:
    there is no other place for it."""
    message = str(error)
    if isinstance(error, InvalidRequest) and error.param:
        message = named(error.param, message)
    body = {"type": "error", "error": {"type": type_of(error), "message": bounded(message)}}
    return msgspec.json.encode(body | ({"request_id": x_request_id} if x_request_id else {}))


def named(param: str, message: str) -> str:
    """A message that names the path once: some begin with the beginning of it (`messages[0]: ...` of `messages[0].role`)."""
    if param in message:
        return message
    head, colon, rest = message.partition(": ")
    has_beginning = bool(colon) and param.startswith((f"{head}.", f"{head}["))
    return f"{param}: {rest if has_beginning else message}"


ANTHROPIC = Dialect(status_of, error_body, (b"x-request-id", b"request-id"))
