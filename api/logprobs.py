"""Log probabilities in OpenAI's two shapes. Those of a token are told with the first text that is certain behind it, or with the finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.said import is_parsed
from pipeline.logprobs import TokenLogprob, record_bytes, unpack_logprobs
from pipeline.protocol import Request
from pipeline.stream import TokenChunk
from pipeline.tokenizer import NoTokenizer, Tokenizer

LEAST = -9999.0  # of what cannot come at all: JSON has no infinity

Entry = tuple[int, TokenLogprob | None]  # a token; None where Redis lost what was known of it


class Logprobs:
    """Those of all choices of a request; what was pushed is kept until it is taken. Where none are asked for it gives None."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_parsed(request)
        self._record_bytes = record_bytes(request.input)
        choices = range(request.input.sampling_options.n)
        self._kept: list[list[Entry]] = [[] for _ in choices]
        self._offsets = [0 for _ in choices]  # characters of the tokens before those that are kept

    @property
    def are_asked(self) -> bool:
        """Whether the request asks for any."""
        return self._record_bytes > 0

    def skip(self, choice: int, token_ids: Sequence[int]) -> None:
        """The first tokens of a choice, whose log probabilities were told."""
        if self.are_asked and not self._is_chat:
            self._offsets[choice] += sum(len(self._text(token_id)) for token_id in token_ids)

    def push(self, chunk: TokenChunk) -> None:
        """Keep what comes with these tokens."""
        if self.are_asked:
            said = unpack_logprobs(chunk.logprobs, self._record_bytes)
            self._kept[chunk.choice] += zip(chunk.token_ids, said, strict=True)

    def take(self, choice: int) -> dict[str, Any] | None:
        """What is kept of a choice, as OpenAI shows it; None where there is nothing."""
        if not self._kept[choice]:
            return None
        entries, self._kept[choice] = self._kept[choice], []
        return (
            {"content": [self._entry(*entry) for entry in entries]} if self._is_chat else self._lists(choice, entries)
        )

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

    def _lists(self, choice: int, entries: Sequence[Entry]) -> dict[str, Any]:
        texts = [self._text(token_id) for token_id, _ in entries]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(text)
        return {
            "tokens": texts,
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

    def _bytes(self, token_id: int) -> bytes:
        if isinstance(self._tokenizer, NoTokenizer):
            return b"token_id:%d" % token_id  # as vLLM shows tokens that have no text
        table = self._tokenizer.token_bytes(skip_special_tokens=False)
        if table is not None:
            return table[token_id] if token_id < len(table) else b""  # padding rows are no token's
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
