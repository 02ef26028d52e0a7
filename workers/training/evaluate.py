"""Scores a trained model on text that it has not seen.

    python -m workers.training.evaluate DIR [--prompts 100] [--device cpu]

Loads the folder through transformers in float32 and answers greedily. Prints one line a skill and some answers to read.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.training import skills
from workers.training.corpus import HELD_OUT_SEED, Message, copy_prompts
from workers.training.phrases import phrases

Task = tuple[list[Message], str]

SHOWN = (
    "What is Baton?",
    "Hello!",
    "who are you",
    "What is a prefill worker?",
    "What is a block handle?",
    "How do I start it?",
    "What happens when a worker dies?",
    "What is 17 + 25?",
    "What is 7 times 8?",
    "Repeat after me: the quick brown fox jumps over the lazy dog",
    "Reverse the words: one two three four five",
    "Count to 12.",
    "What is the capital of France?",
    "What is nine times nine?",
    "What license does Baton have?",
    "Tell me a story about Baton.",
    "Tell me a story about a dragon and a princess.",
    "Tell me a short story about a lighthouse.",
    "Tell me a story about a fox",
    "Write a long story about a robot.",
    "Write a long story about a submarine.",
)
STORY_START = "Once upon a time there was a small fox"


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores a trained baton-tiny.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=100, help="prompts a skill")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=10)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype)).to(
        arguments.device
    )
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    for name, tasks in held_out_tasks(arguments.prompts, tokenizer).items():
        began = time.monotonic()
        right = score(model, tokenizer, tasks, arguments.batch)
        print(f"{name:>28}: {right:4d} of {len(tasks)}   {time.monotonic() - began:.1f} s", flush=True)
    print(samples(model, tokenizer))


def held_out_tasks(prompts: int, tokenizer: Any) -> dict[str, list[Task]]:
    """For each skill, conversations and the one right answer, from seeds that training never draws."""
    rng = random.Random(HELD_OUT_SEED)
    tasks: dict[str, list[Task]] = {
        f"copy, {tokens} tokens": copy_prompts(prompts, tokens, HELD_OUT_SEED + tokens, tokenizer)
        for tokens in (100, 300, 1000, 1900, 3900)
    }
    one_answer: dict[str, Callable[[random.Random], skills.Exchange]] = {
        "Baton, known phrasings": skills.baton_question,
        "small talk": skills.small_talk,
        "arithmetic": skills.arithmetic,
        "repeat": skills.repeat,
        "reverse": skills.reverse,
        "count": skills.count,
        "fallback": skills.fallback,
    }
    for name, make in one_answer.items():
        tasks[name] = [_task([], make(rng)) for _ in range(prompts)]
    tasks["Baton, new phrasings"] = new_phrasings()
    tasks["recall a name"] = [
        _task(turns[:-1], turns[-1]) for turns in (skills.name_recall(rng) for _ in range(prompts))
    ]
    return tasks


def new_phrasings() -> list[Task]:
    """Questions about Baton in forms that training leaves out."""
    exchanges = [
        skills.Exchange(skills.definition_form(form, term.names[0]), term.answer)
        for term in phrases().terms
        for form in phrases().forms["held_out_definition"]
    ]
    exchanges += [
        skills.Exchange(form, question.answer) for question in phrases().held_out_questions for form in question.forms
    ]
    return [_task([], exchange) for exchange in exchanges]


def score(model: Any, tokenizer: Any, tasks: Sequence[Task], batch: int) -> int:
    """How many tasks the model answers exactly."""
    right = 0
    longest = max(len(tokenizer.encode(expected, add_special_tokens=False)) for _, expected in tasks) + 4
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        given = answers(model, tokenizer, [messages for messages, _ in part], longest)
        right += sum(answer == expected for answer, (_, expected) in zip(given, part, strict=True))
    return right


def answers(model: Any, tokenizer: Any, conversations: Sequence[list[Message]], max_new_tokens: int) -> list[str]:
    """Greedy answers, one a conversation, computed as one batch padded on the left."""
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    return completions(model, tokenizer, prompts, max_new_tokens)


def completions(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of texts that are written with their special tokens."""
    inputs = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def samples(model: Any, tokenizer: Any) -> str:
    """Answers for a person to read, and one continued text."""
    given = answers(model, tokenizer, [[{"role": "user", "content": question}] for question in SHOWN], 340)
    shown = [f"> {question}\n{answer}" for question, answer in zip(SHOWN, given, strict=True)]
    continued = completions(model, tokenizer, ["<|bos|>" + STORY_START], 120)
    return "\n\n".join([*shown, f"> (text) {STORY_START}\n{continued[0]}"])


def _task(before: list[skills.Exchange], asked: skills.Exchange) -> Task:
    messages: list[Message] = []
    for exchange in before:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    messages.append({"role": "user", "content": asked.question})
    return messages, asked.answer.strip()


if __name__ == "__main__":
    main()
