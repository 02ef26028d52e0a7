"""What the routes stand on: the pools that are served, and the one copy of everything they share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from api.drain import Drain
from api.metrics import Metrics
from api.rate_limits import RateLimits
from pipeline.batches.creating import Batches
from pipeline.config import ApiSettings
from pipeline.errors import StorageUnavailable
from pipeline.files.store import FileStore
from pipeline.pools import ServedPool, pool_of
from pipeline.redis_health import RedisWatch
from pipeline.scaling.watch import PoolWatch
from pipeline.surface.shape import Shape
from pipeline.surface.shapes.anthropic import AnthropicShape
from pipeline.surface.shapes.openai import OpenAIShape


@dataclasses.dataclass(frozen=True)
class Service:
    """Everything that outlives a request."""

    settings: ApiSettings
    pools: Mapping[str, ServedPool]
    drain: Drain
    metrics: Metrics
    redis: RedisWatch | None = None  # None where nobody looks
    rates: RateLimits | None = None  # None where nobody has a key
    files: FileStore | None = None
    batches: Batches | None = None
    scaling: Mapping[str, PoolWatch] = dataclasses.field(default_factory=dict)

    @property
    def file_store(self) -> FileStore:
        """Where files are. Raises StorageUnavailable where there is no store."""
        if self.files is None:
            raise StorageUnavailable("this server has no store of files")
        return self.files

    @property
    def all_batches(self) -> Batches:
        """Where batches are made. Raises StorageUnavailable where there is no store of files."""
        if self.batches is None:
            raise StorageUnavailable("this server has no store of files, which batches read")
        return self.batches

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
        return pool_of(self.pools, model)
