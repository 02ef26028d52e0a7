"""`/v1/models`, `/health`, `/ready`, `/live`, `/version` and `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import pipeline
from api.service import ServedPool, Service
from pipeline.snapshot import PoolSnapshot

PROBE = ["GET", "HEAD"]


def model_routes(service: Service) -> APIRouter:
    """The configured pools as models; a pool is listed whether or not its workers live, else nothing arrives that could wake them."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(pool) for pool in service.pools.values()]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return _json(_model(service.pool(model)))

    return router


def probe_routes(service: Service) -> APIRouter:
    """What operators and schedulers ask."""
    router = APIRouter()

    @router.api_route("/live", methods=PROBE)
    async def live() -> Response:
        """200 while this process runs."""
        return _json({"status": "ok"})

    @router.api_route("/ready", methods=PROBE)
    async def ready() -> Response:
        """200 while requests may be sent here: Redis answers and this process is not leaving. Workers do not matter."""
        if service.drain.has_begun:
            return _json({"status": "draining"}, 503)
        silent = [name for name, pool in service.pools.items() if pool.client.redis_error]
        return _json({"status": "redis unavailable", "pools": silent}, 503) if silent else _json({"status": "ok"})

    @router.api_route("/health", methods=PROBE)
    async def health() -> Response:
        """Everything that is wrong; 503 when a request sent now could not be answered."""
        pools = {
            name: pool_health(await pool.client.snapshot(), pool.client.redis_error, service.redis_problems())
            for name, pool in service.pools.items()
        }
        is_draining = service.drain.has_begun
        is_ok = not is_draining and all(state["status"] != "unavailable" for state in pools.values())
        status = "draining" if is_draining else worst([state["status"] for state in pools.values()])
        return _json({"status": status, "version": pipeline.__version__, "pools": pools}, 200 if is_ok else 503)

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": pipeline.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        snapshots = {name: await pool.client.snapshot() for name, pool in service.pools.items()}
        return Response(service.metrics.render(snapshots), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def pool_health(snapshot: PoolSnapshot, redis_error: str | None, redis_problems: Sequence[str]) -> dict[str, Any]:
    """One pool: unavailable without Redis or decode workers, degraded without prefill workers or where something is wrong with
    the Redis that answers."""
    workers = {role: len(snapshot.workers.get(role, {})) for role in ("prefill", "decode", "api")}
    problems = [f"Redis does not answer: {redis_error}"] if redis_error else []
    if not workers["decode"]:
        problems.append("no decode worker is alive: requests wait until their deadline")
    status = "unavailable" if problems else "ok"
    if not workers["prefill"]:
        problems.append("no prefill worker is alive: decode workers prefill")
        status = "degraded" if status == "ok" else status
    if redis_problems and not redis_error:
        problems += redis_problems
        status = "degraded" if status == "ok" else status
    waiting = {stage: snapshot.waiting(stage) for stage in ("prefill", "decode")}
    return {"status": status, "problems": problems, "workers": workers, "waiting": waiting}


def worst(states: list[str]) -> str:
    """The state of a whole by those of its parts."""
    return next((state for state in ("unavailable", "degraded") if state in states), "ok")


def _model(pool: ServedPool) -> dict[str, Any]:
    return {
        "id": pool.name,
        "object": "model",
        "created": pool.created_s,
        "owned_by": "baton",
        "max_model_len": pool.preprocessor.max_model_len,
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
