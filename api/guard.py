"""Who asks, and what they may: the caller of a request by its API key, scopes and models.

`Guard` lets nobody in without a valid key, where one is needed: every path but the probes, those that do not exist too. What a key
opens is said by each route's `needs(...)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastapi import Request as HttpRequest
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.edge import refusal
from api.key_ring import KeyRing
from api.metrics import Metrics
from pipeline.api_keys import ApiKey, lane_for
from pipeline.errors import BatonError, NotAllowed

CALLER = "baton.caller"  # where the scope holds the caller
OPENAPI_PATH = "/openapi.json"
OPEN_PATHS = frozenset(("/live", "/ready", "/health", "/version", OPENAPI_PATH))
METRICS_PATH = "/metrics"


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; without a key (none is needed here) anybody, who may do everything."""

    key: ApiKey | None = None

    @property
    def owner(self) -> str:
        """Whose the requests are that it makes, as `Request.owner` holds it."""
        return self.key.id if self.key is not None else ""

    def has_one_of(self, scopes: tuple[str, ...]) -> bool:
        """Whether its key opens what needs one of these scopes."""
        return self.key is None or any(scope in self.key.scopes for scope in scopes)

    def may_use(self, model: str) -> bool:
        """Whether it may ask for a model."""
        return self.key is None or self.key.may_use(model)

    def lane(self, asked: str | None) -> str:
        """The lane of a request of it; `asked` None: the request says nothing."""
        return lane_for(self.key, asked)

    @property
    def max_held(self) -> int:
        """Requests that it may have waiting and running in a pool; 0: no limit."""
        return self.key.concurrent_requests if self.key is not None else 0


ANYBODY = Caller()


class Guard:
    """ASGI middleware: finds the caller, and answers those who need a key and show none that is valid."""

    def __init__(self, app: ASGIApp, ring: KeyRing, metrics: Metrics, *, metrics_need_key: bool) -> None:
        self._app = app
        self._ring = ring
        self._metrics = metrics
        self._open = OPEN_PATHS if metrics_need_key else OPEN_PATHS | {METRICS_PATH}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or not."""
        if scope["type"] == "http" and self._asks_for_key(scope) and self._ring.needs_key:
            try:
                scope[CALLER] = Caller(await self._ring.key_of(secret_of(Headers(scope=scope))))
            except BatonError as error:
                await refusal(Request(scope), error, self._metrics)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _asks_for_key(self, scope: Scope) -> bool:
        """OPTIONS tells only what methods a path has, and browsers send it without a key."""
        return scope["path"] not in self._open and scope["method"] != "OPTIONS"


def secret_of(headers: Headers) -> str | None:
    """The key that a request shows: OpenAI's clients send `Authorization: Bearer`, Anthropic's `x-api-key`. None: it shows none."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def caller(http: HttpRequest) -> Caller:
    """Who sent this request."""
    found: Caller = http.scope.get(CALLER, ANYBODY)
    return found


def needs(*scopes: str) -> Callable[[HttpRequest], None]:
    """A dependency of a route: the caller's key opens one of these. `dependencies=[Depends(needs(ADMIN))]`; raises NotAllowed."""

    def check(http: HttpRequest) -> None:
        if not caller(http).has_one_of(scopes):
            raise NotAllowed(
                f"the API key does not have the scope {' or '.join(scopes)}, which {http.url.path[:200]} needs"
            )

    return check


def check_model(http: HttpRequest, model: str) -> None:
    """Raises NotAllowed for a model that the caller may not ask for, whether or not there is one of that name."""
    if not caller(http).may_use(model):
        raise NotAllowed(f"the API key may not use the model {model[:100]!r}")
