"""The byte-level BPE tokenizer of `baton-tiny`: 2,048 tokens, no unknown token, one token a digit and a sign."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from workers.training.corpus import SIZES, Corpus, segments
from workers.training.words import COMMON, SECRET_WORDS

VOCABULARY_SIZE = 2048
WORD_STARTS = 300
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, END_ID = 0, 1, 2

# Digits and signs never merge: a sum is read digit by digit, and a sentence in quotes has the same tokens as the sentence alone.
_PIECES = r"\p{N}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]|\s+(?!\S)|\s+"

_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|system|>You may call these functions:' }}
{%- for tool in tools %}
{{- '\\n' ~ (tool | tojson) }}
{%- endfor %}
{{- '\\nTo call one, write <tool_call>{\\"name\\": ..., \\"arguments\\": ...}</tool_call><|end|>' }}
{%- endif %}
{%- for message in messages %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception("baton-tiny knows the roles system, user, assistant and tool, not '" ~ message['role'] ~ "'") }}
{%- endif %}
{{- '<|' ~ ('user' if role == 'tool' else role) ~ '|>' }}
{%- if role == 'tool' %}{{- '<tool_response>' }}{%- endif %}
{%- if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] or [] %}
{%- if part['type'] != 'text' %}
{{- raise_exception("baton-tiny reads text only, not content of type '" ~ part['type'] ~ "'") }}
{%- endif %}
{{- part['text'] | trim }}
{%- endfor %}
{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{{- '<tool_call>' ~ ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) ~ '</tool_call>' }}
{%- endfor %}
{%- if role == 'tool' %}{{- '</tool_response>' }}{%- endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# How an answer is read (`transformers.utils.chat_parsing`): calls in the manner of Hermes.
_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {"close": "<|end|>"},
        "tool_calls": {
            "open_pattern": "\\s*<tool_call>\\s*",
            "close_pattern": "\\s*</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


def train_tokenizer(samples_a_size: int = 12_000, seed: int = 7) -> Tokenizer:
    """A tokenizer for the text of `Corpus(seed)`. Every byte is in the vocabulary, so any text can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(samples_a_size, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) so that `AutoTokenizer` reads them."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": _CHAT_TEMPLATE,
        "response_template": _RESPONSE_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _texts(samples_a_size: int, seed: int) -> Iterator[str]:
    corpus = Corpus(seed)
    for size, count in zip(SIZES, (samples_a_size * 4, samples_a_size, samples_a_size // 8, 0, 0), strict=True):
        for sample in corpus.samples(size, count):
            yield from _without_special_tokens(piece.text for piece in segments(sample))
    # A word at the start of an answer has no space before it; it should be one token there too.
    for word in (*SECRET_WORDS, *COMMON):
        yield from [word] * WORD_STARTS


def _without_special_tokens(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "")
        if text:
            yield text
