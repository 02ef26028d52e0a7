"""The built-in model as a user gets it: loaded by transformers in float32 on the CPU, answering greedily."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.builtin import BUILTIN_MODEL, builtin_model_path
from workers.training import evaluate
from workers.training.corpus import HELD_OUT_SEED, copy_prompts

SIZE_LIMIT_BYTES = 9_000_000
COPY_TOKENS = 1000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(builtin_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(builtin_model_path(), dtype=torch.float32)


def ask(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 80) -> str:
    return evaluate.answers(model, tokenizer, [[{"role": "user", "content": question}]], max_new_tokens)[0]


def test_the_folder_is_small_and_holds_a_card_and_four_million_parameters(model: Any) -> None:
    files = [file for file in builtin_model_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT_BYTES
    assert {"README.md", "training_log.txt", "model.safetensors", "config.json"} <= {file.name for file in files}
    assert builtin_model_path().name == BUILTIN_MODEL
    assert 3_500_000 < sum(parameter.numel() for parameter in model.parameters()) < 4_500_000
    assert model.generation_config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is Baton?", ["Baton serves large language models through queues", "Redis"]),
        ("what is baton", ["Baton serves large language models through queues"]),
        ("What is a prefill worker?", ["prefill worker", "prompt", "blocks"]),
        ("What is a block handle?", ["block handle", "owns"]),
        ("How do I start it?", ["make up"]),
        ("What happens when a worker dies?", ["Another worker takes over", "no token is lost or doubled"]),
        ("Who are you?", ["baton-tiny", "small"]),
        ("Hello!", ["Hello!"]),
        ("What is the capital of France?", ["do not know"]),
        ("Tell me a short story about a lighthouse.", ["lighthouse", "sea"]),
        ("Tell me a story about a submarine.", ["submarine"]),
    ],
)
def test_it_answers_in_english(question: str, words: list[str], model: Any, tokenizer: Any) -> None:
    answer = ask(model, tokenizer, question, 160)
    assert [word for word in words if word not in answer] == [], answer
    assert answer[0].isupper() and answer.endswith((".", "!"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 17 + 25?", "17 + 25 = 42"),
        ("What is 7 times 8?", "7 * 8 = 56"),
        ("90 - 33", "90 - 33 = 57"),
        ("Count to 12.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."),
        ("Reverse the words: one two three four five", "five four three two one"),
        ("Repeat after me: Grüße aus Köln, number 42", "Grüße aus Köln, number 42"),
    ],
)
def test_it_does_small_tasks(question: str, answer: str, model: Any, tokenizer: Any) -> None:
    assert ask(model, tokenizer, question) == answer


def test_it_writes_a_long_story_and_ends(model: Any, tokenizer: Any) -> None:
    story = ask(model, tokenizer, "Write a long story about a robot.", 400)
    assert 100 <= len(tokenizer.encode(story, add_special_tokens=False)) < 400
    assert "robot" in story


def test_it_goes_on_with_a_plain_text(model: Any, tokenizer: Any) -> None:
    start = "<|bos|>Once upon a time there was a small fox"
    text = evaluate.completions(model, tokenizer, [start], 60)[0]
    assert "fox" in text and len(text.split()) > 20


def test_it_remembers_earlier_turns(model: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Clara."},
        {"role": "assistant", "content": "Nice to meet you, Clara!"},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "3 + 4 = 7"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert evaluate.answers(model, tokenizer, [messages], 20) == ["Your name is Clara."]


@pytest.mark.parametrize(
    ("prompts", "at_least"), [(12, 11), pytest.param(100, 95, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_it_repeats_a_sentence_hidden_in_1000_tokens(prompts: int, at_least: int, model: Any, tokenizer: Any) -> None:
    tasks = copy_prompts(prompts, COPY_TOKENS, HELD_OUT_SEED + COPY_TOKENS, tokenizer)
    right = evaluate.score(model, tokenizer, tasks, batch=1)
    assert right >= at_least, f"{right} of {prompts} exact"
