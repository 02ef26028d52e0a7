"""The one table from error code to HTTP status, and the shape of an error: OpenAI's, with all four fields, but where a route's clients
know another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pipeline.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
)
from pipeline.queue import STAGES
from pipeline.stream import Ended

LONGEST_MESSAGE = 500  # characters; what a client sent is never echoed at length


class Row(NamedTuple):
    """How one code looks in HTTP, and when it comes."""

    status: int
    type: str
    when: str


TABLE: dict[str, Row] = {
    "invalid_request": Row(400, "invalid_request_error", "`param` names what is wrong"),
    "context_length_exceeded": Row(400, "invalid_request_error", "prompt and answer do not fit the model's context"),
    "unsupported_parameter": Row(400, "invalid_request_error", "`param` names what is not served here"),
    "invalid_api_key": Row(
        401, "authentication_error", "no key, or one that is wrong, unknown, revoked or past its end"
    ),
    "permission_denied": Row(403, "permission_error", "the key lacks the scope or the model"),
    "previous_response_not_found": Row(
        400, "invalid_request_error", "`previous_response_id` is unknown, expired, deleted, or was not to be stored"
    ),
    "model_not_found": Row(404, "invalid_request_error", "no such pool or adapter"),
    "not_found": Row(404, "invalid_request_error", "no such path"),
    "request_not_found": Row(404, "invalid_request_error", "no such request of this key, or its record has expired"),
    "file_not_found": Row(404, "invalid_request_error", "no such file of this key, or it has expired"),
    "batch_not_found": Row(404, "invalid_request_error", "no such batch of this key"),
    "method_not_allowed": Row(405, "invalid_request_error", "`Allow` lists what is"),
    "upload_timeout": Row(408, "invalid_request_error", "an upload took longer than `files.upload_s`"),
    "body_timeout": Row(
        408,
        "timeout_error",
        "the body was not whole after `api.body_timeout_s`, or nothing came of an upload for as long",
    ),
    "idempotency_conflict": Row(409, "invalid_request_error", "the key stands for another body"),
    "body_too_large": Row(413, "invalid_request_error", "more than `api.body_limit_bytes`"),
    "file_too_large": Row(413, "invalid_request_error", "more than `files.max_bytes`"),
    "unsupported_media_type": Row(415, "invalid_request_error", "not JSON (or a form, for uploads), or compressed"),
    "range_not_satisfiable": Row(
        416, "invalid_request_error", "nothing of the range is there; `Content-Range` tells the size"
    ),
    "cancelled": Row(499, "request_cancelled", "somebody else cancelled the request"),
    "rate_limit_exceeded": Row(
        429, "rate_limit_error", "the key's requests or tokens of this minute; `Retry-After` says when there is room"
    ),
    "concurrency_limit_exceeded": Row(429, "rate_limit_error", "the key has as many requests as it may"),
    "resource_unavailable": Row(429, "rate_limit_error", "the low lane is full"),
    "overloaded": Row(
        503,
        "overloaded_error",
        "the queue is full, `Retry-After` from the measured drain rate; or `files.max_uploads` run",
    ),
    "refused": Row(503, "overloaded_error", "not admitted"),
    "draining": Row(503, "server_error", "this process leaves"),
    "redis_unavailable": Row(503, "server_error", "Redis does not answer"),
    "storage_unavailable": Row(503, "server_error", "the store of files failed or does not answer"),
    "queue_timeout": Row(504, "timeout_error", "the deadline passed; the message says in which stage"),
}
INTERNAL = Row(500, "server_error", "failed or given up: nothing of the request was wrong")  # every other code


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


def check_end(ended: Ended, *, is_complete: bool) -> None:
    """Raise why the answer is not one. `is_complete`: each choice has come to its end."""
    if ended.state != "done" or not is_complete:
        raise error_of_end(ended)


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
