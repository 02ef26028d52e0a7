"""Small tokenizers of the three families that Baton tells apart, built in memory, and texts that are hard to cut."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pipeline.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HARD_TEXTS = [
    "Hello world, the quick brown fox jumps over the lazy dog.",
    "naïve café Grüße, Ærøskøbing, Łódź, Ελληνικά, кириллица",
    "東京は日本の首都です。你好世界、 안녕하세요",
    "👋🏽 family: 👨‍👩‍👧‍👦 flags: 🇩🇪🇯🇵 🎉🎉",
    "mixed 12 + 30 = 42 … “quotes” — dashes\n\ttabs  and   spaces ",
    "عربي עברית हिन्दी ไทย",
]

_CORPUS = [*HARD_TEXTS, "Redis carries the work; nobody drops the baton. END. STOP. User: Assistant:"] * 30


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Llama 3, Qwen and baton-tiny, with special and plain added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("wide token é", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and `▁` for spaces, as SentencePiece models have (Llama 2, Mistral, Gemma)."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    ascii_only = [text for text in _CORPUS if text.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(ascii_only, trainer)
    plain = Backend(backend.model)  # the byte tokens are part of the vocabulary, not special
    plain.normalizer, plain.decoder = backend.normalizer, backend.decoder
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """A decoder that looks at neighbours, so no table fits."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def tokenizer(family: str, **config: object) -> Tokenizer:
    """A `Tokenizer` of one family: byte_level, byte_fallback or word_piece."""
    return Tokenizer(
        {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}[family](), config=config
    )
