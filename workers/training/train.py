"""Trains `baton-tiny` from nothing, or further from a folder.

    python -m workers.training.train --out DIR --seconds 480

Worker processes make the text while the model trains; short rows first, because repeating what stands a few words back is learned before
finding it a thousand tokens back. Writes the folder that `AutoModelForCausalLM` and `AutoTokenizer` load, and training_log.txt.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from workers.training import evaluate
from workers.training.batches import FULL_WEIGHT, Chunk, Feeder
from workers.training.corpus import SIZES, Size
from workers.training.tokenizer import BOS_ID, END_ID, PAD_ID, VOCABULARY_SIZE, save_tokenizer, train_tokenizer

WARMUP_STEPS = 200
LANGUAGE_MODEL_WEIGHT = 0.2

# From this share of the time on: how likely a step takes rows of each size.
STAGES: tuple[tuple[float, dict[Size, float]], ...] = (
    (0.0, {"short": 0.85, "medium": 0.15}),
    (0.2, {"short": 0.5, "medium": 0.4, "long": 0.1}),
    (0.35, {"short": 0.45, "medium": 0.25, "long": 0.3}),
    (0.55, {"short": 0.5, "medium": 0.2, "long": 0.15, "longer": 0.15}),
    (0.7, {"short": 0.5, "medium": 0.2, "long": 0.12, "longer": 0.1, "longest": 0.08}),
)


class Arguments(NamedTuple):
    out: Path
    seconds: float
    start: Path | None
    rate: float
    step_tokens: int
    processes: int
    kept_tokens: int
    evaluate_every_s: float
    evaluate_prompts: int
    skip_to: float
    seed: int


class Log:
    """Prints each line and keeps it in training_log.txt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.monotonic()
        path.write_text("")

    def line(self, text: str) -> None:
        stamped = f"{time.monotonic() - self._began:6.0f} s  {text}"
        print(stamped, flush=True)
        with self._path.open("a") as file:
            file.write(stamped + "\n")


class Rows:
    """The newest rows of one size, on the training device."""

    def __init__(self, size: Size, kept_tokens: int, device: torch.device) -> None:
        self._capacity = max(1, kept_tokens // SIZES[size])
        self._ids = torch.zeros(self._capacity, SIZES[size], dtype=torch.int16, device=device)
        self._weights = torch.zeros(self._capacity, SIZES[size], dtype=torch.uint8, device=device)
        self.added = 0

    def add(self, chunk: Chunk) -> None:
        places = torch.arange(self.added, self.added + len(chunk.ids), device=self._ids.device) % self._capacity
        self._ids[places] = torch.from_numpy(chunk.ids).to(self._ids.device)
        self._weights[places] = torch.from_numpy(chunk.weights).to(self._ids.device)
        self.added += len(chunk.ids)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` rows drawn with replacement: ids int64 (count, length) and weights float32 of the same shape, 0 to 1."""
        index = torch.randint(0, min(self.added, self._capacity), (count,), device=self._ids.device)
        return self._ids[index].long(), self._weights[index].float() / FULL_WEIGHT


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "training_log.txt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    log.line(
        f"torch {torch.__version__} on {machine}, {arguments.processes} processes make text, seed {arguments.seed}"
    )

    tokenizer = _tokenizer(arguments)
    save_tokenizer(tokenizer, arguments.out)
    log.line(f"tokenizer of {tokenizer.get_vocab_size()} tokens ready")
    feeder = Feeder(tokenizer.to_str(), arguments.seed, arguments.processes)
    try:
        model = _model(arguments, device)
        log.line(f"model of {sum(p.numel() for p in model.parameters()):,} parameters ready")
        train(model, feeder, arguments, device, log)
    finally:
        feeder.close()
    save_model(model, arguments.out)
    log.line(f"saved, {sum(file.stat().st_size for file in arguments.out.iterdir()):,} bytes")


def train(model: LlamaForCausalLM, feeder: Feeder, arguments: Arguments, device: torch.device, log: Log) -> None:
    """Steps until the time is over; the learning rate falls with the time as a cosine."""
    rows = {size: Rows(size, arguments.kept_tokens, device) for size in SIZES}
    while not rows["short"].added:
        chunk = feeder.wait(120)
        rows[chunk.size].add(chunk)
    compiled = torch.compile(_losses, dynamic=False) if device.type == "cuda" else _losses
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.rate, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.out)
    tasks = evaluate.held_out_tasks(arguments.evaluate_prompts, tokenizer)
    rng = random.Random(arguments.seed)
    began = time.monotonic()
    next_evaluation_s = arguments.evaluate_every_s
    step = seen_tokens = 0
    while (elapsed_s := time.monotonic() - began) < arguments.seconds:
        share = elapsed_s / arguments.seconds
        for chunk in feeder.ready(4):
            rows[chunk.size].add(chunk)
        size = _size(rng, rows, max(share, arguments.skip_to))
        count = max(1, arguments.step_tokens // SIZES[size])
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate_share(step, share)
        answer_loss, text_loss = _step(model, optimizer, compiled, *rows[size].draw(count))
        step += 1
        seen_tokens += count * SIZES[size]
        if step % 500 == 0 or step == 10:
            losses = f"answer loss {answer_loss.item():.4f}, text loss {text_loss.item():.3f}"
            log.line(f"step {step}: {size} {losses}, {seen_tokens / 1e6:.0f} M tokens")
        if elapsed_s > next_evaluation_s:
            next_evaluation_s = elapsed_s + arguments.evaluate_every_s
            save_model(model, arguments.out)
            log.line(f"step {step}: {_scores(model, tokenizer, tasks)}")
    log.line(f"trained {step} steps, {seen_tokens / 1e6:.0f} M tokens, in {time.monotonic() - began:.0f} s")


def rate_share(step: int, share: float) -> float:
    """Share of the highest learning rate: up in a line over the first steps, down as a cosine of the time that has passed."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * share))


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bfloat16."""
    stored: Any = copy.deepcopy(model)
    stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=END_ID, pad_token_id=PAD_ID)
    stored.save_pretrained(folder)


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(ids.device.type, torch.bfloat16):
        answer_loss, text_loss = losses(model, ids, weights)
    optimizer.zero_grad(set_to_none=True)
    (answer_loss + LANGUAGE_MODEL_WEIGHT * text_loss).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return answer_loss.detach(), text_loss.detach()


def _losses(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of the answers (weighted) and of all text (padding left out)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    next_ids, weights = ids[:, 1:], weights[:, 1:]
    each = cross_entropy(logits.flatten(0, 1), next_ids.flatten(), reduction="none").view(next_ids.shape)
    real = (next_ids != PAD_ID).float()
    return (each * weights).sum() / weights.sum().clamp(min=1), (each * real).sum() / real.sum().clamp(min=1)


def _scores(model: Any, tokenizer: Any, tasks: dict[str, list[evaluate.Task]]) -> str:
    model.eval()
    scores = {name: evaluate.score(model, tokenizer, some, 128) / len(some) for name, some in tasks.items()}
    model.train()
    return "; ".join(f"{name} {100 * share:.0f} %" for name, share in scores.items())


def _size(rng: random.Random, rows: dict[Size, Rows], share: float) -> Size:
    chances = next(chances for start, chances in reversed(STAGES) if share >= start)
    size = rng.choices(list(chances), list(chances.values()))[0]
    return size if rows[size].added else "short"


def _tokenizer(arguments: Arguments) -> Tokenizer:
    if arguments.start:
        return Tokenizer.from_file(str(arguments.start / "tokenizer.json"))
    return train_tokenizer()


def _model(arguments: Arguments, device: torch.device) -> Any:
    torch.manual_seed(arguments.seed)
    if arguments.start:
        return LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32).to(device)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device)


def _arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Trains baton-tiny on text that it generates itself.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the tokenizer and the log")
    parser.add_argument("--seconds", type=float, default=480, help="time to train")
    parser.add_argument("--start", type=Path, help="train this folder further, with its tokenizer")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--step-tokens", type=int, default=49_152, help="tokens a step, padding included")
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that make text"
    )
    parser.add_argument(
        "--kept-tokens", type=int, default=200_000_000, help="newest tokens of each row size to draw from"
    )
    parser.add_argument("--evaluate-every-s", type=float, default=75)
    parser.add_argument("--evaluate-prompts", type=int, default=100)
    parser.add_argument(
        "--skip-to", type=float, default=0.0, help="begin at this share of the plan for row sizes (0 to 1)"
    )
    parser.add_argument("--seed", type=int, default=1)
    return Arguments(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
