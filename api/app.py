"""Puts the HTTP surface together. No state but what `Service` holds; several apps may live in one process."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

import pipeline
from api.drain import Drain
from api.edge import Edge, install_error_handlers
from api.generation import generation_routes
from api.metrics import Metrics
from api.probes import model_routes, probe_routes
from api.requests import request_routes
from api.responses import response_routes
from api.service import ServedPool, Service
from pipeline.config import ApiSettings
from pipeline.redis_health import RedisWatch


def create_app(
    settings: ApiSettings, pools: Mapping[str, ServedPool], drain: Drain | None = None, redis: RedisWatch | None = None
) -> FastAPI:
    """The ASGI application over open pools. `drain`: given by the server that knows when the process leaves; `redis`: what
    `/health` tells of Redis beyond whether it answers."""
    AppStatus.enable_automatic_graceful_drain = (
        False  # sse-starlette would cut every stream at SIGTERM; `Drain` ends them
    )
    service = Service(settings, pools, drain or Drain(settings.shutdown_grace_s), Metrics(), redis)
    app = FastAPI(title="Baton", version=pipeline.__version__, openapi_url=None, redirect_slashes=False)
    install_error_handlers(app, service.metrics)
    for routes in (generation_routes, response_routes, request_routes, model_routes, probe_routes):
        app.include_router(routes(service))
    app.add_middleware(Edge)
    return app
