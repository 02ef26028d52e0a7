"""`/v1/models`, `/health`, `/ready`, `/live`, `/version` and `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import pipeline
from api.guard import caller, check_model
from api.json_answers import json_answer
from api.queries import READ
from api.service import Service
from pipeline.pools import ServedPool
from pipeline.snapshot import PoolSnapshot
from pipeline.wording import counted


def model_routes(service: Service) -> APIRouter:
    """The configured pools and their adapters as models, listed whether or not workers live: else nothing arrives that could wake them."""
    router = APIRouter()

    @router.api_route("/v1/models", methods=READ)
    async def models(http: HttpRequest) -> Response:
        served = ((pool, name) for pool in service.pools.values() for name in (pool.name, *pool.loras))
        may_use = caller(http).may_use
        return json_answer({"object": "list", "data": [_model(pool, name) for pool, name in served if may_use(name)]})

    @router.api_route("/v1/models/{model:path}", methods=READ)
    async def model(http: HttpRequest, model: str) -> Response:
        check_model(http, model)
        return json_answer(_model(service.pool(model), model))

    return router


def probe_routes(service: Service) -> APIRouter:
    """What operators and schedulers ask."""
    router = APIRouter()

    @router.api_route("/live", methods=READ)
    async def live() -> Response:
        """200 while this process runs."""
        return json_answer({"status": "ok"})

    @router.api_route("/ready", methods=READ)
    async def ready() -> Response:
        """200 while requests may be sent here: Redis answers and this process is not leaving. Workers do not matter."""
        if service.drain.has_begun:
            return json_answer({"status": "draining"}, 503)
        silent = [name for name, pool in service.pools.items() if pool.client.redis_error]
        return (
            json_answer({"status": "redis unavailable", "pools": silent}, 503)
            if silent
            else json_answer({"status": "ok"})
        )

    @router.api_route("/health", methods=READ)
    async def health() -> Response:
        """Everything that is wrong; 503 when a request sent now could not be answered."""
        pools = {
            name: pool_health(await pool.client.snapshot(), pool.client.redis_error, service.redis_problems())
            for name, pool in service.pools.items()
        }
        is_draining = service.drain.has_begun
        is_ok = not is_draining and all(state["status"] != "unavailable" for state in pools.values())
        status = "draining" if is_draining else worst([state["status"] for state in pools.values()])
        return json_answer({"status": status, "version": pipeline.__version__, "pools": pools}, 200 if is_ok else 503)

    @router.api_route("/version", methods=READ)
    async def version() -> Response:
        return json_answer({"version": pipeline.__version__})

    @router.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        snapshots = {name: await pool.client.snapshot() for name, pool in service.pools.items()}
        looks = {name: watch.last for name, watch in service.scaling.items() if watch.last is not None}
        return Response(service.metrics.render(snapshots, looks), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


class Problem(NamedTuple):
    """One thing that is wrong, and what it makes of the pool: `unavailable` or `degraded`."""

    status: str
    text: str


def pool_health(snapshot: PoolSnapshot, redis_error: str | None, redis_problems: Sequence[str]) -> dict[str, Any]:
    """One pool: unavailable where a request sent now could not be answered, degraded where something else is wrong."""
    of_redis = (
        [Problem("unavailable", redis_error)] if redis_error else [Problem("degraded", p) for p in redis_problems]
    )
    problems = [*of_redis, *_stage_problems(snapshot), *_queue_problems(snapshot)]
    queues = snapshot.own_queues()
    return {
        "status": worst([problem.status for problem in problems]),
        "problems": [problem.text for problem in problems],
        "workers": {role: len(snapshot.workers.get(role, {})) for role in ("prefill", "decode", "api", *queues)},
        "waiting": {stage: snapshot.waiting(stage) for stage in ("prefill", "decode", *queues)},
    }


def _stage_problems(snapshot: PoolSnapshot) -> Iterator[Problem]:
    """Without a prefill worker decode workers prefill; one that is only paused keeps its queue, so what is sent there waits."""
    if not snapshot.workers.get("decode"):
        yield Problem("unavailable", "no decode worker is alive: requests wait until their deadline")
    if not snapshot.workers.get("prefill"):
        yield Problem("degraded", "no prefill worker is alive: decode workers prefill")
    for stage in ("prefill", "decode"):
        if snapshot.all_paused(stage):
            yield Problem(
                "unavailable", f"all {stage} workers are paused: requests wait until one resumes, or for their deadline"
            )


def _queue_problems(snapshot: PoolSnapshot) -> Iterator[Problem]:
    """Of stages of one's own: nobody takes what waits there."""
    for queue in snapshot.own_queues():
        if not (waiting := snapshot.waiting(queue)):
            continue
        if not snapshot.workers.get(queue):
            yield Problem("degraded", f"{counted(waiting, 'task')} on queue {queue}, and no worker of it is alive")
        elif snapshot.all_paused(queue):
            yield Problem("degraded", f"{counted(waiting, 'task')} on queue {queue}, and all its workers are paused")


def worst(states: list[str]) -> str:
    """The state of a whole by those of its parts."""
    return next((state for state in ("unavailable", "degraded") if state in states), "ok")


def _model(pool: ServedPool, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": pool.created_s,
        "owned_by": "baton",
        "max_model_len": pool.preprocessor.max_model_len,
        **({} if name == pool.name else {"parent": pool.name}),
    }
