"""The outermost layer: every response carries an `X-Request-Id`, every error has the shape that the route's clients know, no traceback
leaves the process.

A client's `X-Request-Id` is echoed and logged; it is a label, never a key to anything. The id of the request behind an answer, which is
one, is told in `X-Baton-Request-Id`, whatever the answer is.
"""

from __future__ import annotations

import secrets

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.metrics import Metrics
from pipeline.errors import BatonError, InvalidRequest
from pipeline.labels import FIELD
from pipeline.surface.anthropic_errors import ANTHROPIC, MESSAGES_PATH
from pipeline.surface.errors import OPENAI, Dialect

LONGEST_REQUEST_ID = 128
VERSION = "/v1"  # what paths begin with
REQUEST_ID = "baton.request_id"  # where the scope holds the id of the request behind the answer
MORE_HEADERS = "baton.headers"  # where it holds headers that the answer gets, whatever it is
X_REQUEST_ID = "baton.x_request_id"  # where it holds the label

log = structlog.get_logger("baton.api")


class Edge:
    """ASGI middleware: request ids, and the last resort for errors that nobody expected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = client_request_id(Headers(scope=scope).get("x-request-id"))
        scope[X_REQUEST_ID], dialect = request_id, dialect_of(scope["path"])
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                labels = [(name, request_id.encode()) for name in dialect.id_headers]
                message["headers"] = [*message["headers"], *labels]
                if REQUEST_ID in scope:
                    message["headers"].append((b"x-baton-request-id", scope[REQUEST_ID].encode()))
                for name, value in scope.get(MORE_HEADERS, {}).items():
                    message["headers"].append((name.encode(), value.encode()))
            await send(message)

        with structlog.contextvars.bound_contextvars(**{FIELD: request_id}):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                if has_started:
                    raise
                log.exception("request failed inside the server", path=scope["path"])
                problem = BatonError("internal error; the server's log has the reason under this X-Request-Id")
                await error_response(problem, dialect, request_id)(scope, receive, send_with_id)


def label_of(request: Request) -> str:
    """The label that a request has: its client's, or the one that was made for it."""
    label: str = request.scope.get(X_REQUEST_ID, "")
    return label


def dialect_of(path: str) -> Dialect:
    """How errors look at this path, whether or not there is anything."""
    return ANTHROPIC if f"{path}/".startswith(f"{MESSAGES_PATH}/") else OPENAI


def client_request_id(given: str | None) -> str:
    """The client's id if it is a short printable one, else a new one."""
    if given and len(given) <= LONGEST_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_urlsafe(16)


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Everything that is raised before the headers are out becomes an error body."""

    async def on_baton_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, BatonError)
        return refusal(request, error, metrics)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if request.method == "OPTIONS" and error.status_code == 405:
            return Response(status_code=204, headers=error.headers)
        response = refusal(request, _routing_error(request, error), metrics)
        response.headers.update(error.headers or {})
        return response

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client left while it sent its body; nobody reads this

    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)


def refusal(request: Request, error: BatonError, metrics: Metrics) -> Response:
    """An error as the answer to a request, counted and logged."""
    metrics.refused(error.code)
    response = error_response(error, dialect_of(request.url.path), label_of(request))
    log.info(
        "request refused",
        path=request.url.path,
        status=response.status_code,
        code=error.code,
        param=getattr(error, "param", None),
        error=str(error)[:200],
    )
    return response


def _routing_error(request: Request, error: HTTPException) -> BatonError:
    path = request.url.path[:200]
    if error.status_code == 404:
        return InvalidRequest(f"there is nothing at {path}{_base_url_hint(request)}", code="not_found")
    if error.status_code == 405:
        return InvalidRequest(f"{request.method} is not allowed at {path}", code="method_not_allowed")
    return InvalidRequest(str(error.detail))


def _base_url_hint(request: Request) -> str:
    """What is told where the path would be right with `/v1` in front, or with one instead of two: then the client's base URL is wrong."""
    path: str = request.scope["path"]
    meant = path.removeprefix(VERSION) if path.startswith(f"{VERSION}{VERSION}/") else VERSION + path
    if all(route.matches({**request.scope, "path": meant})[0] is Match.NONE for route in request.app.routes):
        return ""
    return (
        f", but at {meant[:200]}: the base URL of OpenAI's clients ends with {VERSION}, that of Anthropic's without it"
    )
