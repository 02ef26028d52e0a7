"""What Hugging Face `generate` says: the reference that greedy answers are compared with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4  # a first difference where the two best logits are closer than this is counted apart
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1499, 1500)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens, and how far apart the two best logits were at each of them."""

    tokens: list[int]
    margins: list[float]

    def compare(self, tokens: Sequence[int]) -> str:
        """ "equal", "near tie" or what differs."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, tokens, strict=True)):
            if mine != theirs:
                if self.margins[index] < NEAR_TIE:
                    return "near tie"
                return f"token {index}: {theirs} instead of {mine}, margin {self.margins[index]:.2e}"
        return "equal"


class Reference:
    """One model through transformers alone, in float32; on CPU with one thread."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.model.generation_config.eos_token_id = None  # answers end by length, so that all of them are compared
        self.model.generation_config.pad_token_id = 0
        self.vocab_size: int = self.model.config.vocab_size
        self._known: dict[tuple[int, ...], Answer] = {}

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """`max_tokens` greedy tokens after `prompt`. Known answers are given again."""
        key = (max_tokens, *prompt)
        if key not in self._known:
            self._known[key] = self._generate(prompt, max_tokens)
        return self._known[key]

    def _generate(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        best = [logits[0].topk(2).values for logits in out.logits]
        return Answer(out.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best])

    def prompts(self, count: int, seed: int, longest: int = 1500) -> list[list[int]]:
        """Random prompts of 1 to `longest` tokens, block edges first."""
        rng = random.Random(seed)
        edges = [size for size in EDGES if size <= longest]
        sizes = (edges + [rng.randint(1, longest) for _ in range(count)])[:count]
        return [[rng.randrange(16, self.vocab_size) for _ in range(size)] for size in sizes]
