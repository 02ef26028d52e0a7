"""vLLM on GPUs, in float32: prefill on the first, decode on the last, the tokens of vLLM alone. Needs vLLM beside CUDA.

In bfloat16 and with random weights vLLM differs from itself with a cold and a warm prefix cache; the built-in model in float32 does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.engines import require_cuda
from tests.with_vllm.settings import requires_vllm
from tests.with_vllm.test_vllm_parity import COUNT, Alone, alone, compare

__all__ = ["alone"]
pytestmark = [pytest.mark.gpu, requires_vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("way", ["cuda_ipc", "shm"])
async def test_tokens_are_those_of_vllm_alone(
    request: pytest.FixtureRequest, default_redis_url: str, tmp_path: Path, way: str
) -> None:
    require_cuda()
    import torch

    expected: Alone = request.getfixturevalue("alone")
    gpus = "0", str(torch.cuda.device_count() - 1)
    settings = ("transfer.verify=false", f"transfer.kind={way}", "transfer.cuda_arena_bytes=1073741824")
    await compare(expected, default_redis_url, tmp_path, range(COUNT), 28, settings, way=way, gpus=gpus)
