"""vLLM, small enough for a laptop."""

from __future__ import annotations

import importlib.util
import random

import pytest

from tests.system import POOL

VLLM = (
    f"pools.{POOL}.engine=vllm",
    f"pools.{POOL}.max_model_len=2048",
    "engine.vllm.dtype=float32",
    "engine.vllm.block_size=32",
    "engine.vllm.kv_cache_bytes=134217728",
    "engine.vllm.max_num_seqs=32",
    "engine.vllm.max_num_batched_tokens=512",
    "engine.vllm.enforce_eager=true",
)

# fmt: off
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513, 767, 768, 769, 895, 896, 897, 1023, 1024,
         1025, 1279, 1280, 1281, 1499, 1500)
# fmt: on

requires_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here: make test-vllm makes an environment for it",
)


def edge_prompts(count: int) -> list[list[int]]:
    """Random prompts of 1 to 1,500 tokens, block edges and chunk edges first."""
    rng = random.Random(5)
    sizes = [*EDGES, *(rng.randint(1, 1500) for _ in range(count))][:count]
    return [[rng.randrange(16, 2048) for _ in range(size)] for size in sizes]
