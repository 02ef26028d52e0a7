"""`/v1/scaling/{pool}`: how many workers each stage should have and what that follows from, for KEDA and for people."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from api.json_answers import json_answer
from api.queries import READ
from api.service import Service
from pipeline.errors import ModelNotFound
from pipeline.queue import STAGES
from pipeline.scaling.figures import OF_LANE, OF_SPEEDS, OF_STAGE, numbers
from pipeline.scaling.watch import Look


def scaling_routes(service: Service) -> APIRouter:
    """One route."""
    router = APIRouter()

    @router.api_route("/v1/scaling/{pool}", methods=READ)
    async def scaling(pool: str) -> Response:
        watch = service.scaling.get(pool)
        if watch is None:
            raise ModelNotFound(f"there is no pool {pool[:100]!r}; see /v1/models", param="pool")
        return json_answer(shown(pool, await watch.seen()))

    return router


def shown(pool: str, look: Look) -> dict[str, Any]:
    """A look as JSON. What is not known is null."""
    signals = look.signals
    return {
        "object": "scaling",
        "pool": pool,
        "time_ms": signals.clock_ms,
        "stages": {stage: _stage(stage, look) for stage in STAGES},
        **numbers(signals, ("local_prompt_tokens", "local_prompt_tokens_per_s")),
        "speeds": numbers(signals.speeds, OF_SPEEDS),
    }


def _stage(stage: str, look: Look) -> dict[str, Any]:
    said, decision = look.signals.stage(stage), look.decision.stage(stage)
    desired = decision.desired if decision.desired is not None else said.alive  # nothing is known: what there is stays
    return {
        "desired": desired,
        "why": decision.why,
        **numbers(said, OF_STAGE),
        "lanes": {name: numbers(lane, OF_LANE) for name, lane in said.lanes.items()},
    }
