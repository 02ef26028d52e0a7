"""The torch engine beside Hugging Face `generate` on the same weights: one thread each, in turn, medians of the rounds.

Prefill: from submitting one prompt to its first token. Decode: tokens a second while all of the batch are running; for `generate`
the time of many tokens less that of one. Both compute in float32 on the CPU.

    python -m benchmarks.bench_engine [--model DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from benchmarks.table import Row, print_rows
from pipeline.builtin import builtin_model_path
from pipeline.config import EngineSettings, PoolSettings, TorchSettings, TransferSettings
from pipeline.protocol import BackendInput, Log, OutputOptions, SamplingOptions, StopConditions
from workers.engine import AsyncEngine, load_engine
from workers.transfers.block_transfer import BlockTransfer

ROUNDS = 7
PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 128
BATCHES = (1, 16)
GREEDY, PLAIN = SamplingOptions(temperature=0), OutputOptions()
NUMBERS = itertools.count()


def run(model: str = "") -> list[dict[str, Any]]:
    """All rows; `reference` is `generate`, `ratio` above 1 means that the engine is faster."""
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        torch.set_num_threads(1)
        path = model or built_in_or_random(Path(folder))
        rows = asyncio.run(measure(path, Path(folder)))
    return [row.as_dict() for row in rows]


async def measure(path: str, folder: Path) -> list[Row]:
    """Engine and reference take turns, so that both see the same machine."""
    reference = Reference(path)
    transfer = BlockTransfer(TransferSettings(dir=str(folder)), "bench", exports=False)
    settings = EngineSettings(torch=TorchSettings(device="cpu", prefix_cache=False))
    engine = load_engine(PoolSettings(model=path), settings, transfer)
    await engine.start()
    ours = Ours(engine, reference.vocabulary)
    try:
        rows = [await beside("prefill, 512-token prompt", ours.prefill_rate, reference.prefill_rate)]
        for batch in BATCHES:
            name = f"decode, batch {batch}"
            rows.append(
                await beside(name, lambda b=batch: ours.decode_rate(b), lambda b=batch: reference.decode_rate(b))
            )
    finally:
        await engine.close()
    return rows


async def beside(name: str, ours: Callable[[], Any], reference: Callable[[], float]) -> Row:
    """Medians of both in tokens a second, after one round to warm up."""
    values, others = [], []
    for turn in range(ROUNDS + 1):
        value, other = await ours(), reference()
        if turn:
            values.append(value)
            others.append(other)
    return Row(f"torch {name}", statistics.median(values), "tokens/s", statistics.median(others))


class Ours:
    """The engine, driven as a decode worker drives it."""

    def __init__(
        self,
        engine: AsyncEngine,
        vocabulary: int,
        sampling: SamplingOptions = GREEDY,
        output: OutputOptions = PLAIN,
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._output = output

    async def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        start = perf_counter()
        await self._engine.decode(self._request(PREFILL_TOKENS, 1), None, Log.empty(1))
        await anext(self._engine.steps())
        return PREFILL_TOKENS / (perf_counter() - start)

    async def decode_rate(self, batch: int) -> float:
        """Tokens a second between the step in which the last of the batch began and the one in which the first ended."""
        requests = [self._request(PROMPT_TOKENS, NEW_TOKENS + 1) for _ in range(batch)]
        await asyncio.gather(*(self._engine.decode(request, None, Log.empty(1)) for request in requests))
        begun: set[str] = set()
        ended = tokens = 0
        started = stopped = 0.0
        async for outputs in self._engine.steps():
            begun |= {output.request_id for output in outputs}
            ended += sum(output.finish_reason is not None for output in outputs)
            if len(begun) == batch and not stopped:
                started = started or perf_counter()
                tokens += len(outputs)
                stopped = perf_counter() if ended else 0.0
                last = len(outputs)
            if ended == batch:
                break
        return (tokens - last) / (stopped - started)

    def _request(self, prompt_tokens: int, max_tokens: int) -> BackendInput:
        return BackendInput(
            request_id=f"bench-{next(NUMBERS)}",
            model="bench",
            token_ids=[random.randrange(self._vocabulary) for _ in range(prompt_tokens)],
            stop_conditions=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling_options=self._sampling,
            output_options=self._output,
        )


class Reference:
    """Hugging Face `generate`, greedy, with its default attention and cache."""

    def __init__(self, path: str) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.vocabulary: int = self._model.config.vocab_size

    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return PREFILL_TOKENS / self._seconds(1, PREFILL_TOKENS, 1)

    def decode_rate(self, batch: int) -> float:
        """Tokens a second after the first."""
        first_s = self._seconds(batch, PROMPT_TOKENS, 1)
        return batch * NEW_TOKENS / (self._seconds(batch, PROMPT_TOKENS, NEW_TOKENS + 1) - first_s)

    def _seconds(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        input_ids = torch.randint(self.vocabulary, (batch, prompt_tokens))
        start = perf_counter()
        self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return perf_counter() - start


def built_in_or_random(folder: Path) -> str:
    """The built-in model's folder; where its weights are not there, a random model of the same shape."""
    if (builtin_model_path() / "model.safetensors").exists():
        return str(builtin_model_path())
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return str(folder / "model")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or hub id; without it the built-in model")
    print_rows(run(parser.parse_args().model))


if __name__ == "__main__":
    main()
