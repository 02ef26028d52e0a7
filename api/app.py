"""Puts the HTTP surface together. No state but what `Service` holds; several apps may live in one process."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Depends, FastAPI
from sse_starlette.sse import AppStatus
from starlette.middleware.cors import CORSMiddleware

import pipeline
from api.anthropic import anthropic_routes
from api.batches import batch_routes
from api.drain import Drain
from api.edge import Edge, install_error_handlers
from api.embeddings import embedding_routes
from api.files import file_routes
from api.generation import generation_routes
from api.guard import Guard, needs
from api.key_ring import KeyRing
from api.metrics import Metrics
from api.openapi.routes import page_routes
from api.probes import model_routes, probe_routes
from api.rate_limits import HEADER_NAMES, RateLimits
from api.requests import request_routes
from api.responses import response_routes
from api.scaling import scaling_routes
from api.service import Service
from api.tokenizing import tokenizing_routes
from pipeline.api_keys import ADMIN, INFERENCE
from pipeline.batches.creating import Batches
from pipeline.config import ApiSettings
from pipeline.files.store import FileStore
from pipeline.pools import ServedPool
from pipeline.redis_health import RedisWatch
from pipeline.scaling.watch import PoolWatch

EXPOSED_HEADERS = (
    "X-Request-Id", "request-id", "X-Baton-Request-Id", "Retry-After", "retry-after-ms", "x-should-retry", "Content-Range",
    "Content-Disposition", *HEADER_NAMES,
)  # fmt: skip
PREFLIGHT_S = 600  # how long a browser remembers the answer to a preflight


def create_app(
    settings: ApiSettings,
    pools: Mapping[str, ServedPool],
    drain: Drain | None = None,
    redis: RedisWatch | None = None,
    keys: KeyRing | None = None,
    rates: RateLimits | None = None,
    files: FileStore | None = None,
    batches: Batches | None = None,
    scaling: Mapping[str, PoolWatch] | None = None,
) -> FastAPI:
    """The ASGI application over open pools. `drain`: given by the server that knows when the process leaves; `redis`: what
    `/health` tells of Redis beyond whether it answers; `keys` and `rates`: who may ask, and how much (None: anybody, anything);
    `files`: where `/v1/files` keeps them; `batches`: who makes batches of them; `scaling`: who looks at each pool."""
    AppStatus.enable_automatic_graceful_drain = (
        False  # sse-starlette would cut every stream at SIGTERM; `Drain` ends them
    )
    service = Service(
        settings,
        pools,
        drain or Drain(settings.shutdown_grace_s),
        Metrics(),
        redis,
        rates,
        files,
        batches,
        scaling or {},
    )
    app = FastAPI(title="Baton", version=pipeline.__version__, openapi_url=None, redirect_slashes=False)
    install_error_handlers(app, service.metrics)
    for routes in (
        generation_routes,
        response_routes,
        anthropic_routes,
        embedding_routes,
        tokenizing_routes,
        file_routes,
        batch_routes,
        model_routes,
    ):
        app.include_router(routes(service), dependencies=[Depends(needs(INFERENCE))])
    app.include_router(request_routes(service), dependencies=[Depends(needs(INFERENCE, ADMIN))])
    app.include_router(scaling_routes(service))
    app.include_router(probe_routes(service))
    app.include_router(page_routes(lambda: keys is not None and keys.needs_key, settings.metrics_need_key))
    if keys is not None:
        app.add_middleware(Guard, ring=keys, metrics=service.metrics, metrics_need_key=settings.metrics_need_key)
    app.add_middleware(Edge)
    if origins := settings.cors_origins.split():  # outermost: a page is to be told of errors, too
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "HEAD", "POST", "DELETE"], allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS, max_age=PREFLIGHT_S,
        )  # fmt: skip
    return app
