"""`Preprocessor` and `Tokenizer`: prompts to token ids, within the model's limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.backend import Backend
from pipeline.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from pipeline.preprocess import Preprocessor, Wanted
from pipeline.protocol import FinishReason, SamplingOptions, StopConditions
from pipeline.tokenizer import Conversation, NoTokenizer, Tokenizer
from tests import texts


def preprocessor(family: str = "byte_level", **changes: int) -> Preprocessor:
    limits = {"max_model_len": 64, "default_max_tokens": 16, "max_choices": 3} | changes
    return Preprocessor(texts.tokenizer(family), model="m", **limits)


def wants(max_tokens: int | None = None, stop_token_ids: list[int] | None = None) -> Wanted:
    return Wanted(stop=StopConditions(max_tokens=max_tokens, stop_token_ids=stop_token_ids))


def test_messages_become_what_the_chat_template_says() -> None:
    ready = preprocessor()
    found = ready.chat(
        "id-1",
        Conversation(messages=[{"role": "user", "content": "Hello"}]),
        Wanted(sampling=SamplingOptions(seed=3, n=2)),
    )
    text = ready.tokenizer.decode(found.token_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert (found.request_id, found.model) == ("id-1", "m")
    assert (found.sampling_options.seed, found.sampling_options.n) == (3, 2)
    assert found.eos_token_ids == [texts.byte_level().eos_token_id]


def test_a_text_prompt_gets_the_tokenizers_special_tokens_and_ids_stay_as_they_are() -> None:
    ready = preprocessor("byte_fallback")
    assert ready.tokenizer.decode(ready.completion("id", "Hello", wants()).token_ids) == "Hello"
    assert ready.completion("id", [5, 6, 7], wants()).token_ids == [5, 6, 7]


@pytest.mark.parametrize(("prompt_tokens", "resolved"), [(10, 16), (50, 14), (63, 1)])
def test_the_default_output_is_bounded_by_what_remains(prompt_tokens: int, resolved: int) -> None:
    found = preprocessor().completion("id", [5] * prompt_tokens, wants())
    assert found.stop_conditions.max_tokens == resolved


def test_an_asked_output_is_kept_to_the_last_token_that_fits() -> None:
    assert preprocessor().completion("id", [5] * 10, wants(54)).stop_conditions.max_tokens == 54


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "numbers"), [(10, 55, "10 55"), (64, None, "64"), (900, 1, "900 1")]
)
def test_what_does_not_fit_the_context_is_refused_with_the_numbers(
    prompt_tokens: int, max_tokens: int | None, numbers: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        preprocessor().completion("id", [5] * prompt_tokens, wants(max_tokens))
    assert caught.value.param == "prompt"
    assert caught.value.code == "context_length_exceeded"
    for number in ["64", *numbers.split()]:
        assert number in str(caught.value)


def test_more_choices_than_run_at_once_are_refused_with_the_numbers() -> None:
    preprocessor().check_choices(3, "n")
    with pytest.raises(InvalidRequest, match=r"best_of is 4, .* at most 3 choices") as caught:
        preprocessor().check_choices(4, "best_of")
    assert caught.value.param == "best_of"


@pytest.mark.parametrize(
    ("prompt", "param"), [("", "prompt"), ([], "prompt"), ([5, -1], "prompt[1]"), ([99999], "prompt[0]")]
)
def test_prompts_that_are_no_prompt_are_refused(prompt: str | list[int], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        preprocessor().completion("id", prompt, wants())
    assert caught.value.param == param


def test_stop_token_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        preprocessor().completion("id", "Hello", wants(stop_token_ids=[3, 700_000]))
    assert caught.value.param == "stop_token_ids[1]"


def test_a_template_that_refuses_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest, match="unknown role") as caught:
        preprocessor().chat("id", Conversation(messages=[{"role": "developer", "content": "x"}]), wants())
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["chat_template", "messages", "tokenize", "add_generation_prompt", "eos_token"])
def test_a_client_sets_only_the_templates_own_variables(name: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    preprocessor().chat("id", Conversation(messages=messages, variables={"enable_thinking": False}), wants())
    with pytest.raises(InvalidRequest) as caught:
        preprocessor().chat("id", Conversation(messages=messages, variables={name: "{{ 1 }}"}), wants())
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_a_model_without_template_takes_no_messages() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        preprocessor("word_piece").chat("id", Conversation(messages=[{"role": "user", "content": "x"}]), wants())


def test_without_a_tokenizer_there_are_only_token_ids(tmp_path: Path) -> None:
    config = {"vocab_size": 10, "eos_token_id": [7, 8], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = NoTokenizer.load(str(tmp_path))
    assert tokenizer.max_model_len == 64
    ready = Preprocessor(tokenizer, model="m", max_model_len=64, default_max_tokens=16, max_choices=3)
    assert ready.completion("id", [5, 6], wants()).eos_token_ids == [7, 8]
    stopped = Wanted(stop=StopConditions(stop=["x"]))
    for param, refused in (
        ("messages", lambda: ready.chat("id", Conversation(messages=[{"role": "user", "content": "x"}]), wants())),
        ("prompt", lambda: ready.completion("id", "text", wants())),
        ("stop", lambda: ready.completion("id", [5], stopped)),
        ("prompt[1]", lambda: ready.completion("id", [5, 10], wants())),
    ):
        with pytest.raises(InvalidRequest) as caught:
            refused()
        assert caught.value.param == param
    backend = Backend(tokenizer, ready.completion("id", [5], wants()))
    assert (backend.push([1, 2, 3], FinishReason.LENGTH).delta, backend.finish()) == ("", "")


def test_without_a_tokenizer_the_configuration_must_say_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        NoTokenizer.load(str(tmp_path))


def save_model(folder: Path, **files: dict[str, object]) -> None:
    texts.byte_level().save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_folder_tells_end_tokens_context_and_vocabulary(tmp_path: Path) -> None:
    save_model(
        tmp_path,
        config={"max_position_embeddings": 2048, "vocab_size": 1024, "eos_token_id": 9},
        generation_config={"eos_token_id": [7, 8]},
    )
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.eos_token_ids == [7, 8, texts.byte_level().eos_token_id]
    assert (loaded.max_model_len, loaded.vocab_size) == (2048, 1024)
    assert loaded.has_chat_template
    assert loaded.decode(loaded.encode("Grüße 👋🏽", add_special_tokens=False)) == "Grüße 👋🏽"


def test_a_folder_without_configuration_still_has_a_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path)
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.eos_token_ids == [texts.byte_level().eos_token_id]
    assert (loaded.max_model_len, loaded.vocab_size) == (None, len(texts.byte_level()))


def test_a_folder_without_tokenizer_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_loading_a_tokenizer_leaves_torch_alone(tmp_path: Path) -> None:
    save_model(tmp_path)
    code = f"import sys; from pipeline.tokenizer import Tokenizer; Tokenizer.load({str(tmp_path)!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("token", ["-1", "x", "", "1.5", "\u0661", "99999999", "1" * 5000])
def test_a_bias_of_what_is_no_token_is_refused_by_its_name(token: str) -> None:
    asked = Wanted(sampling=SamplingOptions(logit_bias={token: 1.0}))
    with pytest.raises(InvalidRequest, match="is not a token id below") as caught:
        preprocessor().completion("id", [5], asked)
    assert caught.value.param == f"logit_bias.{token[:20]}"
