"""The text that `baton-tiny` is trained on: made from a seed, true to the chat template, right where it can be checked."""

from __future__ import annotations

import json
import random
import re

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipeline.builtin import builtin_model_path
from workers.training import skills
from workers.training.batches import FULL_WEIGHT, row
from workers.training.corpus import HELD_OUT_SEED, SIZES, Corpus, Sample, copy_prompts, segments
from workers.training.phrases import phrases
from workers.training.sentences import varied
from workers.training.stories import SUBJECTS, story
from workers.training.tokenizer import END_ID
from workers.training.train import STAGES
from workers.training.words import invented_word, plural, spelled, strange_text, with_article


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(builtin_model_path())


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    return Tokenizer.from_file(str(builtin_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    corpus = Corpus(seed=5, filler_sentences=500)
    return [sample for size in SIZES for sample in corpus.samples(size, 60)]


def test_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    def texts(seed: int) -> list[Sample]:
        corpus = Corpus(seed, filler_sentences=100)
        return [sample for size in SIZES for sample in corpus.samples(size, 10)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_pieces_are_what_the_chat_template_writes(
    samples: list[Sample], tokenizer: PreTrainedTokenizerFast, backend: Tokenizer
) -> None:
    conversations = [sample for sample in samples if sample.messages]
    assert len(conversations) > 200
    for sample in conversations:
        written = tokenizer.apply_chat_template(list(sample.messages), tokenize=False)
        assert "".join(piece.text for piece in segments(sample)) == written
        assert row(sample, backend)[0] == tokenizer.encode(written, add_special_tokens=False)


def test_only_answers_are_trained_in_full(samples: list[Sample], backend: Tokenizer) -> None:
    for sample in samples:
        ids, weights = row(sample, backend)
        assert len(ids) == len(weights) and all(0 <= weight <= FULL_WEIGHT for weight in weights)
        if sample.messages:
            answers = [message for message in sample.messages if message["role"] == "assistant"]
            assert sum(weight > 0 for weight, token in zip(weights, ids, strict=True) if token == END_ID) == len(
                answers
            )


def test_nearly_all_rows_fit_their_size(backend: Tokenizer) -> None:
    corpus = Corpus(seed=6, filler_sentences=500)
    for size, length in SIZES.items():
        lengths = [len(row(sample, backend)[0]) for sample in corpus.samples(size, 100)]
        assert sum(made > length for made in lengths) <= 20
        assert max(lengths) <= max(SIZES.values())


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(3)
    texts = [
        "",
        " ",
        "  two  spaces ",
        "line\n\n\nbreaks\t",
        "12.50 + 3 = 15.5!?",
        "naïve café",
        "日本語",
        "👩‍👩‍👧 ok",
        '"quoted."',
    ]
    texts += [strange_text(rng) + " " + invented_word(rng) for _ in range(200)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == 2048


@pytest.mark.parametrize("tokens", [80, 137, 1000, 1900])
def test_copy_prompts_hold_their_secret_once_and_keep_to_their_length(
    tokens: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = copy_prompts(8, tokens, HELD_OUT_SEED, tokenizer)
    assert prompts == copy_prompts(8, tokens, HELD_OUT_SEED, tokenizer)
    assert prompts != copy_prompts(8, tokens, HELD_OUT_SEED + 1, tokenizer)
    assert len({expected for _, expected in prompts}) == 8
    for messages, expected in prompts:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokens - 24 <= len(tokenizer.encode(prompt, add_special_tokens=False)) <= tokens
        assert prompt.count(expected) == 1
        assert 6 <= len(expected.split()) <= 13
        assert re.search(r"\d", expected)


def test_secrets_stand_at_every_height_of_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    heights = [
        messages[0]["content"].index(expected) / len(messages[0]["content"])
        for messages, expected in copy_prompts(60, 500, HELD_OUT_SEED, tokenizer)
    ]
    assert {int(height * 4) for height in heights} == {0, 1, 2, 3}


def test_copy_prompts_refuse_a_length_without_room(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="at least 80 tokens, not 40"):
        copy_prompts(1, 40, 1, tokenizer)


def test_arithmetic_answers_are_right() -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        answer = skills.arithmetic(rng).answer
        if answer == phrases().answers["too_large"]:
            refused += 1
            continue
        left, operator, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", answer).groups()
        assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(right)) == int(result)
    assert 20 < refused < 200


def test_repeat_and_reverse_answer_with_what_was_given() -> None:
    rng = random.Random(2)
    for _ in range(500):
        repeated, reversed_ = skills.repeat(rng), skills.reverse(rng)
        assert repeated.answer in repeated.question
        assert " ".join(reversed(reversed_.answer.split())) in reversed_.question


def test_stories_keep_to_their_subject_and_length() -> None:
    rng = random.Random(4)
    for subject in (*SUBJECTS, "submarine"):
        short, long = story(rng, subject), story(rng, subject, long=True)
        assert subject in short and subject in long
        assert 50 <= len(short.split()) <= 110
        assert 100 <= len(long.split()) <= 330
        assert "{" not in short + long


def test_held_out_phrasings_are_not_trained() -> None:
    known = phrases()
    assert not set(known.forms["held_out_definition"]) & set(known.forms["definition"])
    trained = {form for question in known.questions for form in question.forms}
    assert not trained & {form for question in known.held_out_questions for form in question.forms}
    assert {question.answer for question in known.held_out_questions} <= {
        question.answer for question in known.questions
    }


def test_one_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for question in (*phrases().questions, *phrases().small_talk):
        for form in question.forms:
            assert answers.setdefault(form, question.answer) == question.answer


def test_variations_keep_the_words() -> None:
    rng = random.Random(9)
    varieties = {varied(rng, "What is a block handle?") for _ in range(300)}
    assert len(varieties) >= 25
    assert sum("block handle" in text.lower() for text in varieties) > len(varieties) / 2


def test_words() -> None:
    assert [spelled(n) for n in (0, 7, 13, 20, 42, 99)] == [
        "zero",
        "seven",
        "thirteen",
        "twenty",
        "forty-two",
        "ninety-nine",
    ]
    assert [plural(noun) for noun in ("boat", "box", "library", "monkey", "snowman", "torch")] == [
        "boats",
        "boxes",
        "libraries",
        "monkeys",
        "snowmen",
        "torches",
    ]
    assert [with_article(noun) for noun in ("owl", "fox")] == ["an owl", "a fox"]


def test_every_stage_of_training_names_real_sizes_and_adds_up() -> None:
    assert [start for start, _ in STAGES] == sorted(start for start, _ in STAGES) and STAGES[0][0] == 0
    for _, chances in STAGES:
        assert set(chances) <= set(SIZES)
        assert sum(chances.values()) == pytest.approx(1)


def test_template_writes_roles_parts_and_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hello "}]},
    ]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    )


def test_template_writes_tools_calls_and_what_came_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text == (
        '<|bos|><|system|>You may call these functions:\n{"type": "function", "function": {"name": "f"}}\n'
        'To call one, write <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|><|user|>hi<|end|>'
        '<|assistant|><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|end|>'
        "<|user|><tool_response>42</tool_response><|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "critic", "content": "4"}, "knows the roles system, user, assistant and tool, not 'critic'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "not content of type 'image_url'",
        ),
    ],
)
def test_template_refuses_what_it_cannot_write(
    message: dict[str, object], says: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TemplateError, match=re.escape(says)):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_configuration_matches_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = json.loads((builtin_model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["vocab_size"], config["head_dim"], config["tie_word_embeddings"]) == (len(tokenizer), 64, True)
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 4096
    generation = json.loads((builtin_model_path() / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id == END_ID
