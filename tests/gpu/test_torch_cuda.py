"""The torch engine on a CUDA device: the tokens of `generate` on the same device, in a batch and over the transfer.

The contract suite of engines runs there, too: `python -m pytest -m gpu`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from pipeline.builtin import builtin_model_path
from pipeline.config import PoolSettings, TorchSettings
from pipeline.protocol import BackendInput
from tests.contract.engines import Engines, request_of, require_cuda
from tests.reference import Reference
from workers.engines.torch.cache import KVCache
from workers.engines.torch.model import geometry_of, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
PROMPTS, MAX_TOKENS = 40, 16


@pytest.fixture(scope="module")
def reference() -> Reference:
    require_cuda()
    return Reference(builtin_model_path(), device="cuda")


async def test_greedy_tokens_equal_generate_on_the_device(reference: Reference, short_dir: Path) -> None:
    prompts = reference.prompts(PROMPTS, seed=3)
    answers = [reference.greedy(prompt, MAX_TOKENS) for prompt in prompts]
    requests = [request_of(f"r{number}", prompt, MAX_TOKENS) for number, prompt in enumerate(prompts)]
    engines = Engines("torch-cuda", "baton-tiny", short_dir)
    async with engines.engine(num_blocks=8192) as one, engines.engine(num_blocks=2048) as prefill:
        together = [tokens for [tokens] in await one.generate(*requests)]
        pair = [tokens for [tokens] in [await one.take_over(prefill, again(request)) for request in requests]]
    for name, tokens in (("together", together), ("over the transfer", pair)):
        verdicts = [answer.compare(theirs) for answer, theirs in zip(answers, tokens, strict=True)]
        print(f"\n{name}: {verdicts.count('equal')} equal, {verdicts.count('near tie')} near ties of {PROMPTS}")
        assert set(verdicts) <= {"equal", "near tie"}, verdicts
        assert verdicts.count("near tie") <= 1


def again(request: BackendInput) -> BackendInput:
    """The same request under another id."""
    return request_of(f"{request.request_id}-pair", request.token_ids, MAX_TOKENS)


def test_blocks_cross_from_device_to_device_bit_for_bit(reference: Reference) -> None:
    settings = TorchSettings(device="cuda", dtype="bfloat16")
    model = load_model(PoolSettings().model, settings, 0)
    geometry = geometry_of(model.config, settings.block_size, model.dtype)
    caches = [KVCache(geometry, 64, model.device) for _ in range(2)]
    caches[0]._bytes.copy_(torch.randint(0, 256, caches[0]._bytes.shape, dtype=torch.uint8))
    blocks = random.Random(1).sample(range(64), 40)
    staging = memoryview(bytearray(len(blocks) * geometry.block_nbytes))
    caches[0].gather(blocks, staging)
    caches[1].scatter(staging.toreadonly(), blocks[::-1])
    for source, target in zip(blocks, blocks[::-1], strict=True):
        assert torch.equal(caches[0]._bytes[source], caches[1]._bytes[target])
