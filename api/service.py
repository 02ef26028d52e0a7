"""What the routes stand on: the pools that are served, and the one copy of everything they share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from api.drain import Drain
from api.metrics import Metrics
from api.rate_limits import RateLimits
from api.shape import Shape
from api.shapes.anthropic import AnthropicShape
from api.shapes.openai import OpenAIShape
from pipeline.client import PoolClient
from pipeline.config import ApiSettings
from pipeline.embeddings import Offer
from pipeline.errors import ModelNotFound
from pipeline.preprocess import Preprocessor
from pipeline.redis_health import RedisWatch


@dataclasses.dataclass(frozen=True, slots=True)
class ServedPool:
    """One pool as this process serves it; its name is the model's id."""

    name: str
    preprocessor: Preprocessor
    client: PoolClient
    created_s: int
    engine: str = "torch"  # what its workers run: not every engine serves everything
    embeddings: Offer | None = None  # what it gives at /v1/embeddings; None: nothing
    loras: tuple[str, ...] = ()  # adapters of its model, each a model of its own to clients


@dataclasses.dataclass(frozen=True)
class Service:
    """Everything that outlives a request."""

    settings: ApiSettings
    pools: Mapping[str, ServedPool]
    drain: Drain
    metrics: Metrics
    redis: RedisWatch | None = None  # None where nobody looks
    rates: RateLimits | None = None  # None where nobody has a key

    @functools.cached_property
    def openai(self) -> OpenAIShape:
        """How chats and completions look."""
        return OpenAIShape(self.settings.reasoning_field)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """How each kind of request is answered."""
        return {"chat.completion": self.openai, "text_completion": self.openai, "message": AnthropicShape()}

    def redis_problems(self) -> list[str]:
        """What was wrong with Redis when it was last looked at."""
        return self.redis.problems if self.redis is not None else []

    def pool(self, model: str) -> ServedPool:
        """The pool that serves a model id: its own name, or that of an adapter. Raises ModelNotFound."""
        pool = self.pools.get(model) or next((pool for pool in self.pools.values() if model in pool.loras), None)
        if pool is None:
            raise ModelNotFound(f"model {model[:100]!r} does not exist; see /v1/models", param="model")
        return pool
