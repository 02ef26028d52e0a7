"""What a choice costs that is more than temperature and cuts: a grammar's mask a step, and decoding with and without.

The mask: 16 choices of one JSON schema at different places, their matchers moved on by the last token and their masks filled and
applied, with the built-in model's vocabulary and with one of 128,000 made of pairs of its tokens. The reference is the limit, 1 ms.
Decoding: the torch engine on the built-in model at batch 16, one thread, in turn with the same requests without.

    python -m benchmarks.bench_sampling

On a CUDA device, if there is one, the masks alone: from the first look at the matchers until the logits are masked there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer as TokenizerBackend
from transformers import PreTrainedTokenizerFast

from benchmarks.bench_engine import GREEDY, PLAIN, ROUNDS, Ours
from benchmarks.table import Row, print_rows, quantile
from pipeline.builtin import BUILTIN_MODEL
from pipeline.config import EngineSettings, PoolSettings, TorchSettings, TransferSettings
from pipeline.protocol import BackendInput, GuidedDecoding, OutputOptions, SamplingOptions, StopConditions
from pipeline.tokenizer import Tokenizer
from workers.engine import load_engine
from workers.engines.torch.grammars import GrammarConstraint, Grammars, mask
from workers.transfers.block_transfer import BlockTransfer

BATCH = 16
STEPS = 400
LIMIT_MS = 1.0
LARGE = 128_000
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "number": {"type": "number"}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
        "kind": {"enum": ["person", "company", "other"]},
    },
    "required": ["name", "age", "tags", "address", "kind"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 500}  # no answer of it ends meanwhile
KINDS = {
    "a JSON schema": (SamplingOptions(temperature=0, guided_decoding=GuidedDecoding(json=json.dumps(LONG))), PLAIN),
    "penalties": (SamplingOptions(temperature=0, repetition_penalty=1.1, frequency_penalty=0.2), PLAIN),
    "20 log probabilities": (GREEDY, OutputOptions(logprobs=20)),
}


def run() -> list[dict[str, Any]]:
    """All rows."""
    torch.set_num_threads(1)
    builtin = Tokenizer.load(BUILTIN_MODEL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = mask_rows("2,048 tokens", builtin, builtin.vocab_size, device)
    rows += mask_rows("128,000 tokens", enlarged(builtin, LARGE), LARGE, device)
    if device == "cuda":
        return [row.as_dict() for row in rows]
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        rows += asyncio.run(decode_rows(Path(folder), builtin.vocab_size))
    return [row.as_dict() for row in rows]


def mask_rows(name: str, tokenizer: Tokenizer, vocab_size: int, device: str) -> list[Row]:
    """Milliseconds a step of 16 choices; they draw at random, and begin anew when their answer has ended."""
    asked = BackendInput(
        request_id="bench",
        model="bench",
        token_ids=[1],
        stop_conditions=StopConditions(),
        sampling_options=SamplingOptions(guided_decoding=GuidedDecoding(json=json.dumps(SCHEMA))),
    )
    grammars = Grammars(tokenizer, vocab_size)
    constraints: dict[int, GrammarConstraint] = {}
    outputs: list[list[int]] = [[] for _ in range(BATCH)]
    logits = torch.randn(BATCH, vocab_size, device=device)
    times_ms = []
    for _ in range(STEPS):
        for row in set(range(BATCH)) - constraints.keys():
            constraints |= grammars.constrain(asked, {row: []})
            outputs[row] = []
        masked = logits.clone()
        settle(device)
        start = perf_counter()
        for row, constraint in constraints.items():
            constraint.follow(outputs[row])
        failures = mask(masked, sorted(constraints.items()))
        settle(device)
        times_ms.append((perf_counter() - start) * 1000)
        assert not failures
        for row, token in enumerate(torch.multinomial(masked.softmax(dim=-1), 1)[:, 0].tolist()):
            outputs[row].append(token)
            if token in grammars.end_token_ids or len(outputs[row]) > 200:
                del constraints[row]
    return [
        Row(f"mask a step, batch 16, {name}, p50", statistics.median(times_ms), "ms", LIMIT_MS),
        Row(f"mask a step, batch 16, {name}, p99", quantile(times_ms, 0.99), "ms", LIMIT_MS),
    ]


def settle(device: str) -> None:
    """Wait for what the device was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def enlarged(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """The same with pairs of its tokens as tokens, up to `size`."""
    told = json.loads(tokenizer.as_json())
    vocabulary, merges = told["model"]["vocab"], told["model"]["merges"]
    special = {added["content"] for added in told["added_tokens"]}
    plain = [token for token in vocabulary if token not in special]
    pairs = list(itertools.product(plain, plain))
    random.Random(0).shuffle(pairs)
    for first, second in pairs:
        if len(vocabulary) == size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    backend = TokenizerBackend.from_str(json.dumps(told))
    eos = backend.id_to_token(tokenizer.eos_token_ids[0])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos))


async def decode_rows(folder: Path, vocabulary: int) -> list[Row]:
    """Tokens a second at batch 16 with each kind beside those without."""
    transfer = BlockTransfer(TransferSettings(dir=str(folder)), "bench", exports=False)
    settings = EngineSettings(torch=TorchSettings(device="cpu", prefix_cache=False))
    engine = load_engine(PoolSettings(model=BUILTIN_MODEL), settings, transfer)
    await engine.start()
    plain = Ours(engine, vocabulary)
    try:
        return [
            await beside_plain(f"decode, batch 16, with {name}", Ours(engine, vocabulary, sampling, output), plain)
            for name, (sampling, output) in KINDS.items()
        ]
    finally:
        await engine.close()


async def beside_plain(name: str, one: Ours, plain: Ours) -> Row:
    """Medians of both in tokens a second, in turn, after one round to warm up."""
    rates = [(await one.decode_rate(BATCH), await plain.decode_rate(BATCH)) for _ in range(ROUNDS + 1)][1:]
    value, reference = (statistics.median(column) for column in zip(*rates, strict=True))
    return Row(name, value, "tokens/s", reference)


if __name__ == "__main__":
    print_rows(run())
