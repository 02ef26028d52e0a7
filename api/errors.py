"""An error as the answer to a request: status, headers and body."""

from __future__ import annotations

import math

from starlette.responses import Response

from pipeline.errors import BatonError, BodyTimeout, Refused
from pipeline.surface.errors import OPENAI, Dialect


def error_response(error: BatonError, dialect: Dialect = OPENAI, x_request_id: str = "") -> Response:
    """An error as the answer to a request whose headers have not been sent.

    Clients are told whether to send it again, else the official ones do so by the status: twice, at 409 and from 500 on whatever it was.
    """
    status = dialect.status(error)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, Refused) and error.retryable:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if isinstance(error, BodyTimeout):
        headers["connection"] = "close"  # what still comes of the body is read by nobody
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(dialect.body(error, x_request_id), status, headers, "application/json")
