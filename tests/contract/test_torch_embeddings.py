"""Vectors of several families of decoders against Hugging Face's own hidden states, in batches of mixed lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import EngineSettings, PoolSettings, TorchSettings
from tests.contract.engines import VOCABULARY, write_model
from workers.engine import load_embedding_engine

LENGTHS = (3, 1, 130, 300, 16, 127, 128, 5)  # on both sides of what is computed in tiles


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("mode", ["last", "mean"])
async def test_vectors_are_those_of_hugging_face(family: str, mode: str, tmp_path: Path) -> None:
    import torch
    import transformers

    folder = write_model(tmp_path, family)
    engine = load_embedding_engine(
        PoolSettings(model=str(folder), pooling=mode), EngineSettings(torch=TorchSettings(device="cpu"))
    )
    await engine.start()
    sequences = [[(7 * place + count) % VOCABULARY for place in range(count)] for count in LENGTHS]
    try:
        found = await engine.embed("r", sequences, None)
    finally:
        await engine.close()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    for sequence, vector in zip(sequences, found, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([sequence])).last_hidden_state[0].numpy()
        pooled = hidden[-1] if mode == "last" else hidden.mean(axis=0)
        np.testing.assert_allclose(np.frombuffer(vector, "<f4"), pooled / np.linalg.norm(pooled), atol=1e-5)
