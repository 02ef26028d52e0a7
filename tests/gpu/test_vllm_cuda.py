"""vLLM on GPUs, in float32: prefill on the first, decode on the last, the tokens of vLLM alone. Needs vLLM beside CUDA.

In bfloat16 and with random weights vLLM differs from itself with a cold and a warm prefix cache; the built-in model in float32 does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.engines import require_cuda
from tests.contract.transfer_blocks import requires_nixl
from tests.with_vllm.settings import requires_vllm
from tests.with_vllm.test_vllm_parity import COUNT, WAY_SETTINGS, Alone, alone, compare

__all__ = ["alone"]
pytestmark = [pytest.mark.gpu, requires_vllm, pytest.mark.timeout(600)]

CUDA_ARENA = "transfer.cuda_arena_bytes=1073741824"
WAYS = {
    "cuda_ipc": ("transfer.kind=cuda_ipc", CUDA_ARENA), "shm": ("transfer.kind=shm",), "nixl": WAY_SETTINGS["nixl"],
    "vllm-nixl": WAY_SETTINGS["vLLM's own"],
}  # fmt: skip


@pytest.mark.parametrize("way", [pytest.param(way, marks=requires_nixl if "nixl" in way else ()) for way in WAYS])
async def test_tokens_are_those_of_vllm_alone(
    request: pytest.FixtureRequest, default_redis_url: str, tmp_path: Path, way: str
) -> None:
    require_cuda()
    import torch

    expected: Alone = request.getfixturevalue("alone")
    gpus = "0", str(torch.cuda.device_count() - 1)
    settings = ("transfer.verify=false", *WAYS[way])
    await compare(expected, default_redis_url, tmp_path, range(COUNT), 28, settings, way=way, gpus=gpus)
