"""The one table from error code to HTTP status, and the shape of an error: OpenAI's, with all four fields, but where a route's clients
know another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from starlette.responses import Response

from pipeline.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    Refused,
    RequestCancelled,
    RequestFailed,
)
from pipeline.queue import STAGES
from pipeline.stream import Ended

LONGEST_MESSAGE = 500  # characters; what a client sent is never echoed at length


class Row(NamedTuple):
    """How one code looks in HTTP."""

    status: int
    type: str


TABLE: dict[str, Row] = {
    "invalid_request": Row(400, "invalid_request_error"),
    "context_length_exceeded": Row(400, "invalid_request_error"),
    "unsupported_parameter": Row(400, "invalid_request_error"),
    "invalid_api_key": Row(401, "authentication_error"),
    "permission_denied": Row(403, "permission_error"),
    "previous_response_not_found": Row(400, "invalid_request_error"),
    "model_not_found": Row(404, "invalid_request_error"),
    "not_found": Row(404, "invalid_request_error"),
    "request_not_found": Row(404, "invalid_request_error"),
    "method_not_allowed": Row(405, "invalid_request_error"),
    "idempotency_conflict": Row(409, "invalid_request_error"),
    "body_too_large": Row(413, "invalid_request_error"),
    "unsupported_media_type": Row(415, "invalid_request_error"),
    "cancelled": Row(499, "request_cancelled"),
    "rate_limit_exceeded": Row(429, "rate_limit_error"),
    "concurrency_limit_exceeded": Row(429, "rate_limit_error"),
    "resource_unavailable": Row(429, "rate_limit_error"),
    "overloaded": Row(503, "overloaded_error"),
    "refused": Row(503, "overloaded_error"),
    "draining": Row(503, "server_error"),
    "redis_unavailable": Row(503, "server_error"),
    "queue_timeout": Row(504, "timeout_error"),
}
INTERNAL = Row(500, "server_error")  # every other code


class ErrorBody(msgspec.Struct, frozen=True):
    """`{"error": {...}}`: code and param are null where there is none."""

    message: str
    type: str
    param: str | None
    code: str | None


class Dialect(NamedTuple):
    """How the errors of some routes look. `body` is given the `X-Request-Id`, which the answers have in all of `id_headers`."""

    status: Callable[[BatonError], int]
    body: Callable[[BatonError, str], bytes]
    id_headers: tuple[bytes, ...] = (b"x-request-id",)


def row_of(error: BatonError) -> Row:
    """Status and type of an error."""
    return TABLE.get(error.code, INTERNAL)


def bounded(message: str) -> str:
    """A message of a length that is told."""
    return message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"


def error_text(error: BatonError) -> str:
    """What is told of an error."""
    return bounded(str(error))


def error_json(error: BatonError) -> bytes:
    """The body of an error, also the data of an error event in a stream."""
    param = error.param if isinstance(error, InvalidRequest) else None
    return msgspec.json.encode({"error": ErrorBody(error_text(error), row_of(error).type, param, error.code)})


OPENAI = Dialect(lambda error: row_of(error).status, lambda error, _: error_json(error))


def error_response(error: BatonError, dialect: Dialect = OPENAI, x_request_id: str = "") -> Response:
    """An error as the answer to a request whose headers have not been sent.

    Clients are told whether to send it again, else the official ones do so by the status: twice, at 409 and from 500 on whatever it was.
    """
    status = dialect.status(error)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, Refused) and error.retryable:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(dialect.body(error, x_request_id), status, headers, "application/json")


def error_of_end(ended: Ended) -> BatonError:
    """Why a request that was accepted did not become an answer."""
    match ended.state:
        case "expired":
            return DeadlineExceeded(f"the request's time ran out {_where(ended)}", stage=ended.stage)
        case "cancelled":
            return RequestCancelled(f"the request was cancelled: {ended.reason}")
        case "dead":
            return RequestFailed(f"the request was given up after repeated failures: {ended.reason}")
        case "failed":
            return RequestFailed(f"the request failed: {ended.reason}")
        case _:
            return RequestFailed(f"the request ended as {ended.state} before its answer was complete")


def _where(ended: Ended) -> str:
    """The stage a request stood in, and whether a worker had taken it there."""
    if not ended.stage:
        return "in an unknown stage"
    if ended.stage not in STAGES:  # of others no claim is in the timeline
        return f"in {ended.stage}"
    is_claimed = ended.timeline.claimed_prefill if ended.stage == "prefill" else ended.timeline.claimed_decode
    return f"in {ended.stage}" if is_claimed else f"while it waited for {ended.stage}"
