"""Vectors on a CUDA device: those of Hugging Face on the same device, and in bfloat16 close to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from pipeline.builtin import builtin_model_path
from pipeline.config import EngineSettings, PoolSettings, TorchSettings
from tests.contract.engines import require_cuda
from workers.engine import load_embedding_engine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
LENGTHS = (3, 1, 130, 2000, 16, 128, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
async def test_vectors_are_those_of_hugging_face_on_the_device(dtype: str, tolerance: float) -> None:
    require_cuda()
    settings = TorchSettings(device="cuda", dtype=dtype)  # type: ignore[arg-type]
    engine = load_embedding_engine(PoolSettings(), EngineSettings(torch=settings))
    await engine.start()
    sequences = [[(7 * place + count) % 2000 + 3 for place in range(count)] for count in LENGTHS]
    try:
        found = await engine.embed("r", sequences, None)
    finally:
        await engine.close()
    model = transformers.AutoModel.from_pretrained(builtin_model_path(), dtype=torch.float32).cuda()
    for sequence, vector in zip(sequences, found, strict=True):
        with torch.inference_mode():
            last = model(torch.tensor([sequence], device="cuda")).last_hidden_state[0, -1].cpu().numpy()
        np.testing.assert_allclose(np.frombuffer(vector, "<f4"), last / np.linalg.norm(last), atol=tolerance)
