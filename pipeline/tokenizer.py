"""One model's tokenizer and what text handling must know of the model: end tokens, chat template, longest context.

Loaded from a folder or a hub id. A model with a `tokenizer.json` is read through `PreTrainedTokenizerFast`, which leaves torch alone
(60 MB and 0.7 s instead of 250 MB and 3 s where torch is installed); others fall back to `AutoTokenizer`, which may convert them.

A token's bytes are a table where the model's decoder works on bytes (byte-level BPE, or byte fallback as in SentencePiece models).
Then the text of a sequence is the UTF-8 decoding of the joined bytes, and detokenizing costs one look-up a token.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as TokenizerBackend
from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from pipeline.builtin import BUILTIN_MODEL, builtin_model_path
from pipeline.errors import ConfigError, InvalidRequest
from pipeline.parsers.templated import ResponseFormat

Message = Mapping[str, Any]

RESPONSE_TEMPLATES = Path(__file__).parent / "response_templates"
NO_TEMPLATE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template makes a prompt of. `tools` and `documents` as transformers has them; `variables`: the template's own, such as
    `enable_thinking`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TokenToBytes = Callable[[str], bytes]


class NoTokenizer:
    """A model that is served by token ids alone: what its configuration says of them. It needs a folder with a `config.json`."""

    def __init__(
        self, vocab_size: int, *, eos_token_ids: Sequence[int] = (), max_model_len: int | None = None,
        hidden_size: int | None = None,
    ) -> None:  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.eos_token_ids = list(eos_token_ids)
        self.max_model_len = max_model_len

    @classmethod
    def load(cls, source: str) -> NoTokenizer:
        """`source`: as `Tokenizer.load` takes it. Raises ConfigError where the vocabulary is not said."""
        place = model_source(source)
        config, generation_config = _read_json(place, "config.json"), _read_json(place, "generation_config.json")
        vocab_size = _model_value(config, "vocab_size")
        if vocab_size is None:
            raise ConfigError(f"{source!r} has no config.json with a vocab_size, which a pool without tokenizer needs")
        eos_token_ids = _named_eos(config, generation_config)
        return cls(
            vocab_size, eos_token_ids=eos_token_ids, max_model_len=_max_model_len(config),
            hidden_size=_model_value(config, "hidden_size"),
        )  # fmt: skip


class Tokenizer:
    """Text to token ids and back for one model. Reading only; safe to share between threads.

    `eos_token_ids` end a generation; `vocab_size` bounds ids in requests (the model's embedding rows where `config.json` says so);
    `max_model_len` and `hidden_size` are what `config.json` says, None where it says nothing. `response_format`: how the model writes
    reasoning and calls of tools, None where nobody says.
    """

    def __init__(
        self,
        hf: Any,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        response_template: str = "",
    ) -> None:
        config, generation_config = config or {}, generation_config or {}
        self._hf = hf
        self._backend: TokenizerBackend = hf.backend_tokenizer
        parameters = inspect.signature(hf.apply_chat_template).parameters  # a client's template could loop for ever
        self._reserved = frozenset([*parameters, *hf.special_tokens_map, "messages"])
        self._tables: dict[bool, list[bytes] | None] = {}
        self.eos_token_ids: list[int] = _eos_token_ids(hf, config, generation_config)
        self.vocab_size: int = _model_value(config, "vocab_size") or self._backend.get_vocab_size(
            with_added_tokens=True
        )
        self.max_model_len: int | None = _max_model_len(config)
        self.response_format: ResponseFormat | None = response_format(
            response_template, getattr(hf, "response_template", None)
        )
        self.hidden_size: int | None = _model_value(config, "hidden_size")

    @classmethod
    def load(cls, source: str, *, response_template: str = "") -> Tokenizer:
        """`source`: the name of a built-in model, a folder, or a hub id. `response_template`: as `response_format` takes it. Raises
        ConfigError where there is no usable tokenizer."""
        place = model_source(source)
        try:
            hf = _load_hf(place)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"no tokenizer in {source!r}: {error}") from error
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ConfigError(f"the tokenizer of {source!r} has no fast form (tokenizer.json)")
        return cls(
            hf,
            config=_read_json(place, "config.json"),
            generation_config=_read_json(place, "generation_config.json"),
            response_template=response_template,
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Releases the GIL while it works (the batch call does, the single one does not)."""
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence, as the model's own decoder gives it."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def known_tokens(self) -> int:
        """Ids that the tokenizer has, added ones among them; models may have fewer or more."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def as_json(self) -> str:
        """The tokenizer as a `tokenizer.json`, of which no text is padded or cut."""
        plain = TokenizerBackend.from_str(self._backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        return plain.to_str()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be talked to in messages."""
        return self._hf.chat_template is not None

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        """The name of each token in the vocabulary; empty for an id that has none."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def render(self, conversation: Conversation) -> str:
        """The prompt that the model's chat template makes. Raises InvalidRequest where the template refuses it, or a variable is not the
        client's to set."""
        variables = conversation.variables
        reserved = sorted(self._reserved & variables.keys())
        if reserved:
            raise InvalidRequest(f"{reserved[0]} cannot be set", param=f"chat_template_kwargs.{reserved[0]}")
        try:
            text: str = self._hf.apply_chat_template(
                list(conversation.messages),
                tools=conversation.tools or None,
                documents=conversation.documents or None,
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                **variables,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def shows_special(self, texts: Sequence[str]) -> bool:
        """Whether any of these texts holds a special token that does not end a generation."""
        added = self._backend.get_added_tokens_decoder().items()
        special = [token.content for index, token in added if token.special and index not in self.eos_token_ids]
        return any(token in text for token in special for text in texts)

    @property
    def has_byte_fallback(self) -> bool:
        """Whether bytes of characters that the vocabulary lacks are tokens of their own, as in SentencePiece models."""
        return "ByteFallback" in _kinds(_decoder_steps(self._backend))

    def token_bytes(self, *, skip_special_tokens: bool) -> list[bytes] | None:
        """Bytes of each token id, or None where the model's decoder does not work on bytes. Built once, then shared."""
        if skip_special_tokens not in self._tables:
            self._tables[skip_special_tokens] = self._build_table(skip_special_tokens)
        return self._tables[skip_special_tokens]

    def _build_table(self, skip_special_tokens: bool) -> list[bytes] | None:
        to_bytes = _token_to_bytes(_decoder_steps(self._backend))
        if to_bytes is None:
            return None
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * max(self.vocab_size, max(vocab.values(), default=-1) + 1)
        for token, index in vocab.items():
            table[index] = to_bytes(token)
        for index, added in self._backend.get_added_tokens_decoder().items():
            table[index] = b"" if skip_special_tokens and added.special else to_bytes(added.content)
        return table


def response_format(said: str, models_own: Any) -> ResponseFormat | None:
    """How answers are read. `said`: empty for the model's own template, `none`, the name of one of Baton's, or a JSON file. Raises
    ConfigError where there is no such template, or it is none."""
    if not said:
        return ResponseFormat(models_own) if isinstance(models_own, dict) else None
    if said == NO_TEMPLATE:
        return None
    path = RESPONSE_TEMPLATES / f"{said}.json" if re.fullmatch(r"\w+", said) else Path(said)
    try:
        return ResponseFormat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        names = ", ".join(sorted(path.stem for path in RESPONSE_TEMPLATES.glob("*.json")))
        raise ConfigError(f"response_template {said!r}: {error}; give a JSON file, or one of: {names}") from error


def model_source(source: str) -> str:
    """Where a model is: the folder of the built-in model by its name, everything else as it stands."""
    return str(builtin_model_path()) if source == BUILTIN_MODEL else source


def _load_hf(place: str) -> Any:
    if cached_file(place, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is not None:
        return PreTrainedTokenizerFast.from_pretrained(place)
    from transformers import AutoTokenizer  # imports torch where it is installed

    return AutoTokenizer.from_pretrained(place)


def _read_json(place: str, name: str) -> dict[str, Any]:
    path = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{name} of {place!r} is not an object")
    return value


def _model_value(config: Mapping[str, Any], key: str) -> int | None:
    """A number of the text model, which multimodal configurations keep one level down."""
    value = config.get(key, config.get("text_config", {}).get(key))
    return value if isinstance(value, int) and value > 0 else None


def _max_model_len(config: Mapping[str, Any]) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
        value = _model_value(config, key)
        if value is not None:
            return value
    return None


def _eos_token_ids(hf: Any, config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> list[int]:
    """The ids that `generation_config.json` names (else `config.json`), and the tokenizer's own."""
    own = [hf.eos_token_id] if hf.eos_token_id is not None else []
    return list(dict.fromkeys([*_named_eos(config, generation_config), *own]))


def _named_eos(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> list[int]:
    named = generation_config.get("eos_token_id", config.get("eos_token_id"))
    return [named] if isinstance(named, int) else list(named or [])


def _decoder_steps(backend: TokenizerBackend) -> list[dict[str, Any]]:
    """What the decoder does to the names of tokens, one after the other; nothing where there is none."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _kinds(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [step["type"] for step in steps]


def _token_to_bytes(steps: Sequence[Mapping[str, Any]]) -> TokenToBytes | None:
    """A function from a token's name in the vocabulary to its bytes, for the decoders that can be told by a table."""
    kinds = _kinds(steps)
    if kinds == ["ByteLevel"]:
        return _byte_level(_byte_level_alphabet())
    if kinds == ["Metaspace"]:
        return _sentence_piece(str(steps[0]["replacement"]), byte_fallback=False)
    is_space = kinds[:1] == ["Replace"] and steps[0]["content"] == " " and "String" in steps[0]["pattern"]
    if is_space and kinds[1:] in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return _sentence_piece(str(steps[0]["pattern"]["String"]), byte_fallback=True)
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next code point from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(alphabet: Mapping[str, int]) -> TokenToBytes:
    def to_bytes(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # an added token that was never spelt in the alphabet
            return token.encode()

    return to_bytes


BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _sentence_piece(space: str, *, byte_fallback: bool) -> TokenToBytes:
    def to_bytes(token: str) -> bytes:
        if byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return token.replace(space, " ").encode()

    return to_bytes
