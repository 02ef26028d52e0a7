"""LoRA adapters of a pool: a name and a folder each, and no name stands for two models."""

from __future__ import annotations

import pytest

from pipeline.config import PoolSettings
from pipeline.errors import ConfigError
from pipeline.loras import check_model_names, loras_of


def pool(loras: str, engine: str = "vllm") -> PoolSettings:
    return PoolSettings(engine=engine, loras=loras)  # type: ignore[arg-type]


def test_names_and_folders_are_read_as_vllm_has_them() -> None:
    assert loras_of(pool("")) == {}
    assert loras_of(pool("story=/a/b 'sql=/with a space/c'  x=y=z")) == {
        "story": "/a/b",
        "sql": "/with a space/c",
        "x": "y=z",
    }


@pytest.mark.parametrize("loras", ["story", "=/a", "story=", "a=/b a=/c", "'a=/b"])
def test_what_is_no_adapter_is_named(loras: str) -> None:
    with pytest.raises(ConfigError, match="loras"):
        loras_of(pool(loras))


@pytest.mark.parametrize("engine", ["torch", "mock"])
def test_an_engine_without_them_is_named(engine: str) -> None:
    with pytest.raises(ConfigError, match=engine):
        loras_of(pool("a=/b", engine))
    assert loras_of(pool("", engine)) == {}


def test_a_name_stands_for_one_model() -> None:
    check_model_names({"base": pool("a=/b"), "other": pool("b=/b")})
    for pools in (
        {"base": pool("base=/b")},
        {"base": pool(""), "x": pool("base=/b")},
        {"x": pool("a=/b"), "y": pool("a=/b")},
    ):
        with pytest.raises(ConfigError, match="already the name of a model"):
            check_model_names(pools)
