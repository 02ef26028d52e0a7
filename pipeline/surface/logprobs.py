"""Log probabilities in OpenAI's two shapes, and those of prompts in vLLM's. Those of a token are told with the first text that is certain
behind it, or with the finish; those of a prompt with the first event, or in front of the answer's where the prompt is echoed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.answer_form import form_of
from pipeline.logprobs import PromptLogprob, TokenLogprob, record_bytes, unpack_logprobs, unpack_prompt_logprobs
from pipeline.protocol import Request
from pipeline.stream import TokenChunk
from pipeline.surface.said import is_parsed
from pipeline.tokenizer import NoTokenizer, Tokenizer

LEAST = -9999.0  # of what cannot come at all: JSON has no infinity
INLINE_ENTRIES = 4096  # of a prompt: more are made in a thread, so that they do not hold up the streams
INSIDE_CHARACTERS = bytes(range(0x80, 0xC0))  # bytes that begin none, in UTF-8

Entry = tuple[int, TokenLogprob | None]  # a token; None where Redis lost what was known of it
PromptEntries = list[dict[int, dict[str, Any]] | None]


class Logprobs:
    """Those of all choices of a request; what was pushed is kept until it is taken. Where none are asked for it gives None."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request) -> None:
        form, options = form_of(request), request.input.output_options
        self._tokenizer = tokenizer
        self._input = request.input
        self._is_chat = is_parsed(request)
        self._record_bytes = record_bytes(request.input)
        self._prompt_top = form.prompt_logprobs
        self._echo_top = options.logprobs if form.echoes and not form.hides_logprobs else None
        self._prompt: bytes | None = None
        choices = range(request.input.sampling_options.n)
        self._kept: list[list[Entry]] = [[] for _ in choices]
        self._has_echoed = [self._echo_top is None for _ in choices]
        self._offsets = [0 for _ in choices]  # where the text of the first token that is kept begins

    @property
    def are_asked(self) -> bool:
        """Whether the request asks for any."""
        return self._record_bytes > 0 or self._prompt_top is not None

    def skip(self, choice: int, token_ids: Sequence[int]) -> None:
        """The first tokens of a choice, whose log probabilities were told; those of a prompt that is echoed before them."""
        if not self._record_bytes or self._is_chat:
            return
        if not self._has_echoed[choice]:
            self._has_echoed[choice] = True
            self._offsets[choice] += sum(self._width(token_id, is_echo=True) for token_id in self._input.token_ids)
        self._offsets[choice] += sum(self._width(token_id) for token_id in token_ids)

    def push(self, chunk: TokenChunk) -> None:
        """Keep what comes with these tokens."""
        if chunk.prompt_logprobs is not None:
            self._prompt = chunk.prompt_logprobs
        if self._record_bytes:
            said = unpack_logprobs(chunk.logprobs, self._record_bytes)
            self._kept[chunk.choice] += zip(chunk.token_ids, said, strict=True)

    def take(self, choice: int) -> dict[str, Any] | None:
        """What is kept of a choice, as OpenAI shows it; None where there is nothing."""
        entries, self._kept[choice] = self._kept[choice], []
        if self._is_chat:
            return {"content": [self._entry(*entry) for entry in entries]} if entries else None
        widths = [self._width(token_id) for token_id, _ in entries]
        if not self._has_echoed[choice] and self._prompt is not None:
            self._has_echoed[choice] = True
            entries = [*self._echoed(self._prompt), *entries]
            widths = [self._width(token_id, is_echo=True) for token_id in self._input.token_ids] + widths
        return self._lists(choice, entries, widths) if entries else None

    def prompt(self) -> PromptEntries | None:
        """Those of the prompt as vLLM shows them, where they are told: None for the first token, and where Redis lost what was known."""
        if self._prompt is None or self._prompt_top is None:
            return None
        rows = unpack_prompt_logprobs(self._prompt, self._input)
        return [
            None if row is None else self._ranked(token_id, row, self._prompt_top)
            for token_id, row in zip(self._input.token_ids, rows, strict=True)
        ]

    def _ranked(self, token_id: int, row: PromptLogprob, top: int) -> dict[int, dict[str, Any]]:
        """By token id: the token itself, then the likeliest."""
        said = {token_id: (row.logprob, row.rank)}
        said |= {likely: (logprob, rank) for rank, (likely, logprob) in enumerate(row.top[:top], start=1)}
        return {
            token: {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._text(token)}
            for token, (logprob, rank) in said.items()
        }

    def _echoed(self, records: bytes) -> list[Entry]:
        rows = unpack_prompt_logprobs(records, self._input)
        return [
            (token_id, None if row is None else TokenLogprob(row.logprob, row.top[: self._echo_top]))
            for token_id, row in zip(self._input.token_ids, rows, strict=True)
        ]

    def _entry(self, token_id: int, said: TokenLogprob | None) -> dict[str, Any]:
        top = said.top if said else []
        return {
            **self._token(token_id, said.logprob if said else None),
            "top_logprobs": [self._token(*likely) for likely in top],
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._bytes(token_id)),
        }

    def _lists(self, choice: int, entries: Sequence[Entry], widths: Sequence[int]) -> dict[str, Any]:
        offsets = []
        for width in widths:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += width
        return {
            "tokens": [self._text(token_id) for token_id, _ in entries],
            "token_logprobs": [_finite(said.logprob) if said else None for _, said in entries],
            "top_logprobs": [self._likely(*entry) for entry in entries],
            "text_offset": offsets,
        }

    def _likely(self, token_id: int, said: TokenLogprob | None) -> dict[str, float | None] | None:
        """The likeliest, and the token itself where it is none of them."""
        if said is None:
            return None
        likely = {self._text(other): _finite(logprob) for other, logprob in said.top}
        return likely | {self._text(token_id): _finite(said.logprob)}

    def _text(self, token_id: int) -> str:
        return self._bytes(token_id).decode("utf-8", "replace")

    def _width(self, token_id: int, *, is_echo: bool = False) -> int:
        """How many characters begin with a token in the text that is shown; an echo shows no special tokens."""
        hides_special = is_echo or self._input.output_options.skip_special_tokens
        return len(self._bytes(token_id, skip_special_tokens=hides_special).translate(None, INSIDE_CHARACTERS))

    def _bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        if isinstance(self._tokenizer, NoTokenizer):
            return b"token_id:%d" % token_id  # as vLLM shows tokens that have no text
        table = self._tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        if table is not None:
            return table[token_id] if token_id < len(table) else b""  # padding rows are no token's
        return self._tokenizer.decode([token_id], skip_special_tokens=skip_special_tokens).encode()


def is_long(request: Request) -> bool:
    """Whether what is told of its prompt takes so long to make that others would wait for it."""
    top = request.input.output_options.prompt_logprobs
    return top is not None and len(request.input.token_ids) * (1 + top) > INLINE_ENTRIES


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if logprob > LEAST else LEAST  # what is not a number, too
