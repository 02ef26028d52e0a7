"""The torch engine's greedy tokens equal those of Hugging Face `generate` on the same weights.

Where the reference's two best logits are less than 1e-4 apart, either token is right: such near ties are counted apart.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.protocol import BackendInput
from tests.contract.engines import BLOCK, VOCABULARY, Engines, request_of, write_model

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
NEAR_TIE = 1e-4
NEW_TOKENS = 24
EDGES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 4 * BLOCK - 1, 511, 512, 513]


class Reference:
    """Hugging Face `generate`, greedy, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def generate(self, token_ids: list[int], max_tokens: int) -> list[int]:
        generated = self._model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
        )
        tokens: list[int] = generated[0, len(token_ids) :].tolist()
        return tokens

    def margin(self, token_ids: list[int]) -> float:
        """How far apart the two best logits after these tokens are."""
        with torch.inference_mode():
            best = self._model(torch.tensor([token_ids])).logits[0, -1].topk(2).values
        return float(best[0] - best[1])

    def near_ties(self, requests: list[BackendInput], answers: list[list[int]]) -> int:
        """Answers whose first difference is a near tie; any other difference fails."""
        ties = 0
        for request, tokens in zip(requests, answers, strict=True):
            expected = self.generate(request.token_ids, len(tokens))
            if tokens != expected:
                first = next(
                    index for index, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]
                )
                margin = self.margin(request.token_ids + expected[:first])
                assert margin < NEAR_TIE, f"{request.request_id}: token {first} differs, margin {margin}"
                ties += 1
        return ties


def prompts(count: int, longest: int, seed: int = 0) -> list[BackendInput]:
    """Random prompts, block edges first."""
    rng = random.Random(seed)
    lengths = [length for length in EDGES if length <= longest][:count]
    lengths += [rng.randint(1, longest) for _ in range(count - len(lengths))]
    return [
        request_of(f"r{number}", [rng.randrange(VOCABULARY) for _ in range(length)], NEW_TOKENS)
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_equal_generate(family: str, tmp_path: Path, short_dir: Path) -> None:
    engines = Engines("torch", str(write_model(tmp_path, family)), short_dir)
    requests = prompts(12, 600)
    async with engines.engine() as one, engines.engine() as prefill, engines.engine() as decode:
        together = [tokens for [tokens] in await one.generate(*requests)]
        pair = [tokens for [tokens] in [await decode.take_over(prefill, request) for request in requests]]
    reference = Reference(tmp_path)
    assert reference.near_ties(requests, together) == 0
    assert reference.near_ties(requests, pair) == 0


async def test_a_model_outside_of_the_family_runs_whole(tmp_path: Path, short_dir: Path) -> None:
    folder = write_model(tmp_path, "olmo2")
    requests = prompts(6, 100)
    async with Engines("torch", str(folder), short_dir).engine() as one:
        together = [tokens for [tokens] in await one.generate(*requests)]
    assert Reference(folder).near_ties(requests, together) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [{"num_blocks": 2048}, {"num_blocks": 2048, "prefix_cache": False}, {"num_blocks": 112}],
    ids=["prefix cache", "no prefix cache", "forced preemption"],
)
async def test_two_hundred_prompts(family: str, fields: dict[str, Any], tmp_path: Path, short_dir: Path) -> None:
    engines = Engines("torch", str(write_model(tmp_path, family)), short_dir)
    requests = prompts(200, 1500)
    answers: list[list[int]] = []
    async with engines.engine(**fields, max_num_seqs=32) as one:
        answers = [tokens for [tokens] in await one.generate(*requests)]
        stats = one.engine.stats()
        assert max(step.blocks_used for step in one.engine.step_log()) <= fields["num_blocks"]
    ties = Reference(tmp_path).near_ties(requests, answers)
    print(f"{family}: {ties} near ties of 200, {stats.preemptions} preemptions")
    assert ties <= 2
    assert (stats.preemptions > 0) == (fields["num_blocks"] < 200)
