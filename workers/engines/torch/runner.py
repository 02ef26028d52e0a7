"""The runner that computes steps with PyTorch, in one thread of its own so that the event loop stays free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pipeline.config import PoolSettings, TorchSettings
from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, SamplingOptions
from workers.engines.paged.blocks import new_table
from workers.engines.paged.prompts import Asked
from workers.engines.paged.runner import Chosen, Draw, Row, RunnerInfo
from workers.engines.torch.attention import ATTENTION_NAME, PagedStep
from workers.engines.torch.cache import KVCache
from workers.engines.torch.decoder import decoder_of
from workers.engines.torch.dense import DenseMemory, can_copy
from workers.engines.torch.grammars import GrammarConstraint, Grammars, grammars_of
from workers.engines.torch.heap import keep_freed_memory
from workers.engines.torch.logprobs import score
from workers.engines.torch.model import fingerprint, geometry_of, load_model, model_length
from workers.engines.torch.sampling import choose
from workers.transfer import Memory

log = logging.getLogger("baton.torch")

PROBE_LENGTH = 24  # tokens by which the paged attention is compared with the model's own at start
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit


class TorchRunner:
    """A `Runner` over a Hugging Face decoder."""

    def __init__(self, settings: TorchSettings, pool: PoolSettings) -> None:
        self._settings = settings
        self._pool = pool
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="torch")
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._grammars: Grammars | Unservable
        self._model: Any = None

    async def start(self) -> RunnerInfo:
        """Load the model, take the memory of all blocks, compare the attention with the model's own."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._load)

    async def run(self, rows: Sequence[Row]) -> list[Chosen]:
        """See `Runner.run`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, rows)

    async def constrain(
        self, request: BackendInput, logs: Mapping[int, Sequence[int]]
    ) -> Mapping[int, GrammarConstraint]:
        """See `Runner.constrain`."""
        if isinstance(self._grammars, Unservable):
            raise Unservable(
                f"request {request.request_id}: model {self._pool.model} follows no grammars: {self._grammars}"
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compilers, self._grammars.constrain, request, logs)

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner.copy_block`."""
        self._cache.copy(source, target)

    def clear(self, blocks: Sequence[int]) -> None:
        """See `Runner.clear`."""
        self._cache.clear(blocks)

    @property
    def device(self) -> int | None:
        """See `Runner.device`."""
        return self._cache.device.index if self._cache.device.type == "cuda" else None

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """See `Runner.gather`."""
        self._cache.gather(blocks, out)

    def scatter(self, data: Memory, blocks: Sequence[int]) -> None:
        """See `Runner.scatter`."""
        self._cache.scatter(data, blocks)

    async def close(self) -> None:
        """See `Runner.close`."""
        self._executor.shutdown(wait=True)
        self._compilers.shutdown(wait=True)
        self._model = None

    def _load(self) -> RunnerInfo:
        torch.set_num_threads(self._settings.threads)
        settings, name = self._settings, self._pool.model
        self._model = load_model(name, settings, self._pool.max_model_len)
        geometry = geometry_of(self._model.config, settings.block_size, self._model.dtype)
        self._cache = KVCache(geometry, settings.num_blocks, self._model.device)
        heads = self._model.config.get_text_config(decoder=True).num_attention_heads
        self._memory = DenseMemory(self._cache, heads) if can_copy(self._cache) else None
        length = model_length(self._model.config, self._pool.max_model_len)
        layout = fingerprint(self._model, geometry)
        eager = self._eager_logits()
        self._vocab_size = eager.shape[-1]
        with torch.inference_mode():
            self._decoder = decoder_of(self._model, length)
        self._compare(eager)
        scores_prompts = self._compare_head(eager)
        try:
            self._grammars = grammars_of(self._pool, eager.shape[-1])
        except Unservable as reason:  # all else is served
            self._grammars = reason
        if self._model.device.type == "cpu":
            keep_freed_memory()
        return RunnerInfo(
            name="torch",
            model=name,
            layout=layout,
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            block_nbytes=geometry.block_nbytes,
            max_model_len=length,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_cache=settings.prefix_cache,
            vocab_size=self._vocab_size,
            scores_prompts=scores_prompts,
        )

    @torch.inference_mode()
    def _compute(self, rows: Sequence[Row]) -> list[Chosen]:
        logits = self._forward(rows)
        if logits is None:
            return []
        counts = [len(row.draws) for row in rows if row.draws]
        if max(counts) > 1:
            logits = logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0)
        return choose(logits, [draw for row in rows for draw in row.draws])

    def _forward(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """Logits [rows that sample, vocabulary] of the last position of each, in float32; None where no row samples."""
        step = PagedStep(rows, self._cache, self._memory)
        logits = self._decoder.logits(step) if not step.asked else self._score(step)
        if self._memory is not None:
            self._memory.advance()
        return logits.float() if len(step.sampling) else None

    def _score(self, step: PagedStep) -> torch.Tensor:
        """The same logits, from the hidden states of all positions: those of prompts are looked at, too."""
        hidden = self._decoder.hidden(step)
        score(step.asked, hidden, self._decoder.head, self._vocab_size)
        return self._decoder.head(hidden[step.sampling])

    @torch.inference_mode()
    def _eager_logits(self) -> torch.Tensor:
        """The model's own logits after the probe."""
        self._model.set_attn_implementation("eager")
        tokens = torch.tensor([self._probe_tokens()], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        self._model.set_attn_implementation(ATTENTION_NAME)
        return logits

    @torch.inference_mode()
    def _compare(self, eager: torch.Tensor) -> None:
        """Compute the probe over blocks, as a prompt, a chunk and a token: an architecture that asks for more than plain
        attention shows here, not in its answers."""
        tokens = self._probe_tokens()
        table = new_table(range(-(-len(tokens) // self._settings.block_size)))
        draw = Draw(SamplingOptions(), choice=0, index=0, banned=(), eos_token_ids=())
        half, last = len(tokens) // 2, len(tokens) - 1
        try:
            for start, end in ((0, half), (half, last), (last, len(tokens))):
                paged = self._forward([Row(tokens[start:end], start, table, [draw])])
        except Unservable:
            raise
        except Exception as error:  # code of a model that we do not know
            raise Unservable(f"model {self._pool.model}: it does not run on paged attention: {error}") from error
        self._cache.clear(table)
        difference = self._difference(paged, eager)
        if not difference < PROBE_TOLERANCE[self._model.dtype]:
            raise Unservable(
                f"model {self._pool.model}: paged attention gives other logits than the model's own, by {difference:.2g} "
                "of the largest; its attention does something that the torch engine does not know"
            )

    @torch.inference_mode()
    def _compare_head(self, eager: torch.Tensor) -> bool:
        """Whether hidden states become the model's own logits here, as prompts that are scored need it; without that all else is served."""
        tokens = self._probe_tokens()
        table = new_table(range(-(-len(tokens) // self._settings.block_size)))
        draw = Draw(SamplingOptions(), choice=0, index=0, banned=(), eos_token_ids=())
        try:
            logits = self._forward([Row(tokens, 0, table, [draw], Asked(0, tokens[1:], 1))])
            return self._difference(logits, eager) < PROBE_TOLERANCE[self._model.dtype]
        except Exception as error:  # noqa: BLE001  # code of a model that we do not know
            log.warning("model %s: log probabilities of prompts are not served: %s", self._pool.model, error)
            return False
        finally:
            self._cache.clear(table)

    def _difference(self, logits: torch.Tensor | None, eager: torch.Tensor) -> float:
        """Of the last position, as a share of the largest."""
        assert logits is not None
        return float((logits[0] - eager).abs().max() / eager.abs().max())

    def _probe_tokens(self) -> list[int]:
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        return [(7 * position + 1) % vocabulary for position in range(PROBE_LENGTH)]
