"""LoRA adapters of a pool: each is a model of its own to clients, by its name."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from pipeline.config import PoolSettings
from pipeline.errors import ConfigError
from pipeline.features import LORA, is_served


def loras_of(pool: PoolSettings) -> dict[str, str]:
    """The folder of each adapter by its name, from `NAME=FOLDER NAME2=FOLDER2`. Raises `ConfigError`."""
    loras: dict[str, str] = {}
    try:
        parts = shlex.split(pool.loras)
    except ValueError as error:
        raise ConfigError(f"pools.<name>.loras: {error}") from error
    for part in parts:
        name, _, folder = part.partition("=")
        if not name or not folder:
            raise ConfigError(f"pools.<name>.loras: {part!r} is not NAME=FOLDER")
        if name in loras:
            raise ConfigError(f"pools.<name>.loras: {name} is there twice")
        loras[name] = folder
    if loras and not is_served(pool.engine, LORA):
        raise ConfigError(f"pools.<name>.loras: the engine {pool.engine} serves no LoRA")
    return loras


def check_model_names(pools: Mapping[str, PoolSettings]) -> None:
    """Raise `ConfigError` where a name would stand for two models."""
    taken = {name: f"pools.{name}" for name in pools}
    for pool, settings in pools.items():
        for name in loras_of(settings):
            if name in taken:
                raise ConfigError(f"pools.{pool}.loras: {name} is already the name of a model of {taken[name]}")
            taken[name] = f"pools.{pool}"
