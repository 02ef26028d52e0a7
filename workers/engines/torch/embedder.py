"""Vectors of token sequences by a Hugging Face decoder, in one thread of its own so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.builtin import model_place
from pipeline.config import EngineSettings, PoolSettings
from pipeline.errors import Unservable
from workers.engine import EmbeddingEngine, EngineInfo
from workers.engines.embedding import BatchedEmbedding
from workers.engines.torch.attention import ATTENTION_NAME
from workers.engines.torch.decoder import decoder_of
from workers.engines.torch.heap import keep_freed_memory
from workers.engines.torch.model import load_model, model_length
from workers.engines.torch.pooling import pooling_of
from workers.engines.torch.ragged import RaggedStep

PROBE_LENGTHS = (5, 24)  # tokens of two sequences by which the ragged row is compared with the model's own attention
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest number


def create_embedding_engine(pool: PoolSettings, engine: EngineSettings) -> EmbeddingEngine:
    """An engine over the pool's model; nothing is loaded before `start`."""
    return BatchedEmbedding(TorchEmbedder(pool, engine))


class TorchEmbedder:
    """An `Embedder`. The model is the one that generates; its head is not used, and no keys and values are kept."""

    def __init__(self, pool: PoolSettings, engine: EngineSettings) -> None:
        self._pool = pool
        self._settings = engine.torch
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="torch")

    async def start(self) -> EngineInfo:
        """See `Embedder.start`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._load)

    async def vectors(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See `Embedder.vectors`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, sequences)

    @property
    def is_normalized(self) -> bool:
        """See `Embedder.is_normalized`."""
        return self._pooling.is_normalized

    async def close(self) -> None:
        """See `Embedder.close`."""
        await asyncio.to_thread(self._executor.shutdown, wait=True)

    def _load(self) -> EngineInfo:
        settings, name = self._settings, self._pool.model
        torch.set_num_threads(settings.threads)
        self._pooling = pooling_of(name, model_place(name), self._pool.pooling)
        model = load_model(name, settings, self._pool.max_model_len)
        self._device, self._dtype = model.device, model.dtype
        length = model_length(model.config, self._pool.max_model_len)
        text = model.config.get_text_config(decoder=True)
        probe = [[(7 * place + 1) % text.vocab_size for place in range(count)] for count in PROBE_LENGTHS]
        eager = self._eager(model, probe)
        with torch.inference_mode():
            self._decoder = decoder_of(model, length)
        self._compare(probe, eager)
        if self._device.type == "cpu":
            keep_freed_memory()
        return EngineInfo(
            name="torch",
            model=name,
            layout=f"{self._pooling.mode} of {text.hidden_size}",
            block_size=1,  # a task is counted in tokens, and keeps none
            num_blocks=2**31 - 1,
            block_nbytes=1,
            max_model_len=length,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )

    @torch.inference_mode()
    def _compute(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        step = RaggedStep(sequences, self._device, self._dtype)
        pooled: NDArray[np.float32] = self._pooling.vectors(self._decoder.hidden(step), step.bounds).cpu().numpy()
        return pooled

    @torch.inference_mode()
    def _eager(self, model: Any, probe: Sequence[list[int]]) -> torch.Tensor:
        """The model's own hidden states of the probe, one sequence at a time."""
        model.set_attn_implementation("eager")
        rows = [
            model.base_model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).last_hidden_state
            for tokens in probe
        ]
        model.set_attn_implementation(ATTENTION_NAME)
        return torch.cat([row[0] for row in rows]).float()

    @torch.inference_mode()
    def _compare(self, probe: Sequence[list[int]], eager: torch.Tensor) -> None:
        """An architecture that asks for more than plain attention shows here, not in its vectors."""
        try:
            ragged = self._decoder.hidden(RaggedStep(probe, self._device, self._dtype)).float()
        except Unservable:
            raise
        except Exception as error:  # code of a model that we do not know
            raise Unservable(f"model {self._pool.model}: it does not run on a ragged row: {error}") from error
        difference = float((ragged - eager).abs().max() / eager.abs().max())
        if not difference < PROBE_TOLERANCE[self._dtype]:
            raise Unservable(
                f"model {self._pool.model}: a ragged row gives other hidden states than the model's own attention, by "
                f"{difference:.2g} of the largest; its attention does something that the torch engine does not know"
            )
