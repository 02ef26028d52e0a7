"""How long a request may be and how many choices it may have, from what is set and what is there."""

from __future__ import annotations

from typing import Literal

import pytest

from pipeline.config import EngineSettings, MockSettings, PoolSettings, TorchSettings, VllmSettings
from pipeline.errors import ConfigError
from pipeline.pools import max_choices, max_model_len


@pytest.mark.parametrize(
    ("is_set", "model_says", "num_blocks", "limit"),
    [
        (0, 4096, 1024, 4096),
        (100, 4096, 1024, 100),
        (9999, 4096, 1024, 4096),
        (9999, None, 1024, 9999),
        (0, 4096, 10, 160),
    ],
)
def test_the_least_of_setting_model_and_blocks_holds(
    is_set: int, model_says: int | None, num_blocks: int, limit: int
) -> None:
    engine = EngineSettings(torch=TorchSettings(block_size=16, num_blocks=num_blocks))
    assert max_model_len("p", PoolSettings(max_model_len=is_set), engine, model_says) == limit


def test_a_mock_engine_says_its_own_context() -> None:
    engine = EngineSettings(mock=MockSettings(max_model_len=777))
    assert max_model_len("p", PoolSettings(engine="mock"), engine, 4096) == 777


def test_a_context_that_nobody_says_must_be_set() -> None:
    with pytest.raises(ConfigError, match=r"pools\.p\.max_model_len"):
        max_model_len("p", PoolSettings(), EngineSettings(), None)


@pytest.mark.parametrize(("is_set", "model_says", "limit"), [(0, 4096, 4096), (100, 4096, 100), (9999, None, 9999)])
def test_vllm_counts_its_blocks_itself(is_set: int, model_says: int | None, limit: int) -> None:
    pool = PoolSettings(engine="vllm", max_model_len=is_set)
    assert max_model_len("p", pool, EngineSettings(), model_says) == limit
    with pytest.raises(ConfigError, match=r"pools\.p\.max_model_len"):
        max_model_len("p", PoolSettings(engine="vllm"), EngineSettings(), None)


@pytest.mark.parametrize(("name", "most"), [("torch", 7), ("mock", 8), ("vllm", 9)])
def test_choices_are_as_many_as_the_pools_engine_runs_at_once(
    name: Literal["torch", "mock", "vllm"], most: int
) -> None:
    engine = EngineSettings(
        torch=TorchSettings(max_num_seqs=7), mock=MockSettings(max_num_seqs=8), vllm=VllmSettings(max_num_seqs=9)
    )
    assert max_choices(PoolSettings(engine=name), engine) == most


@pytest.mark.parametrize(
    ("args", "most"),
    [('{"max_num_seqs": 4, "seed": 1}', 4), ('{"seed": 1}', 9), ("broken", 9), ('{"max_num_seqs": "4"}', 9)],
)
def test_vllms_own_arguments_win(args: str, most: int) -> None:
    engine = EngineSettings(vllm=VllmSettings(max_num_seqs=9, args=args))
    assert max_choices(PoolSettings(engine="vllm"), engine) == most
