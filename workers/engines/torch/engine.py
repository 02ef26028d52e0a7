"""The torch engine as configured."""

from __future__ import annotations

from pipeline.config import EngineSettings, PoolSettings
from workers.engine import AsyncEngine
from workers.engines.paged.engine import PagedEngine
from workers.engines.torch.runner import TorchRunner
from workers.transfer import Transfer


def create_engine(pool: PoolSettings, engine: EngineSettings, transfer: Transfer) -> AsyncEngine:
    """An engine over the pool's model; nothing is loaded before `start`."""
    return PagedEngine(TorchRunner(engine.torch, pool), transfer)
