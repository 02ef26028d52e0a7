"""Tokens to text, one choice at a time: whole characters only, and nothing of a stop string.

The text after k tokens is a function of these k tokens alone, never of how they were grouped into calls. Decode workers run a `Backend`
to decide stop strings before they log tokens, the API runs one to make text; both find the same cut.

    tokens ──> Detokenizer ──> text ──> stop strings ──> delta
               holds back          holds back the longest end of the text
               a torn character    that could still become a stop string

A request is a continuation, so a SentencePiece model's first space is text and stays.
"""

from __future__ import annotations

from codecs import register_error, utf_8_decode
from collections.abc import Sequence
from typing import Protocol

import msgspec

from pipeline.protocol import BackendInput, FinishReason
from pipeline.tokenizer import NoTokenizer, Tokenizer

LONGEST_TORN_CHARACTER_TOKENS = 8  # a character has at most 4 bytes; a replacement character that stays longer is meant


class Text(msgspec.Struct, frozen=True, gc=False):
    """`delta`: text that is now certain. `accepted`: how many of the pushed tokens belong to the choice (the one that completes a stop
    string is the last). `stopped`: a stop string is complete; nothing follows."""

    delta: str
    accepted: int
    stopped: bool


class Backend:
    """The text of one choice of `request`. Push what the choice's log gets, in order; then `finish` unless a push said `stopped`."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: BackendInput) -> None:
        stop, include = request.stop_conditions, request.sampling_options.include_stop_str_in_output
        self._detokenizer = detokenizer(tokenizer, skip_special_tokens=request.output_options.skip_special_tokens)
        self._stops = StopStrings(stop.stop, include=include) if stop.stop else None
        self._unwatched = max(0, (stop.min_tokens or 0) - 1)  # tokens whose text is no part of a stop string
        self._hidden = frozenset() if include else frozenset([*request.eos_token_ids, *(stop.stop_token_ids or ())])
        self._stopped = False

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice; None where none did."""
        return self._stops.found if self._stops is not None else None

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> Text:
        """`finish_reason`: why the engine ended the choice with the last of these tokens, if it did. A token that ended the choice by
        its id (end of sequence, a stop token) is accepted but is no text, unless stop strings are to be included."""
        count = len(token_ids)
        if finish_reason is not None and count and self._ends_by_id(finish_reason, token_ids[-1]):
            token_ids = token_ids[:-1]
        if self._stops is None:
            return Text(self._detokenizer.push(token_ids), count, False)
        return self._push_watched(self._stops, token_ids, count)

    def finish(self) -> str:
        """The held-back end of the text, when the choice ends and no push said `stopped`. A torn character at the end may complete a
        stop string, too: then `stop_string` says so."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        if self._unwatched:
            return self._stops.finish() + rest
        delta, self._stopped = self._stops.push(rest)
        return delta + self._stops.finish()

    def _ends_by_id(self, reason: FinishReason, last: int) -> bool:
        return reason in (FinishReason.EOS, FinishReason.STOP) and last in self._hidden

    def _push_watched(self, stops: StopStrings, token_ids: Sequence[int], count: int) -> Text:
        """Token by token, so that the token that completes a stop string is known."""
        if self._stopped:
            return Text("", 0, True)
        certain: list[str] = []
        for position, token_id in enumerate(token_ids, start=1):
            text = self._detokenizer.push((token_id,))
            if self._unwatched:
                self._unwatched -= 1
                certain.append(text)
                continue
            delta, self._stopped = stops.push(text)
            certain.append(delta)
            if self._stopped:
                return Text("".join(certain), position, True)
        return Text("".join(certain), count, False)


class StopStrings:
    """Finds the stop string that is complete first in a growing text; of two that end at the same character, the longer.

    Text is held back while it is a proper beginning of a stop string, so what was given out never has to be taken back.
    `found`: the one that is complete.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=1)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string is complete (then the text ends before it, or behind it if included)."""
        if not text:
            return "", False
        window = self._held + text
        cut = self._first_complete(window)
        if cut is not None:
            start, end = cut
            self._held, self.found = "", window[start:end]
            return window[: end if self._include else start], True
        keep = self._start_of_held(window)
        self._held = window[keep:]
        return window[:keep], False

    def finish(self) -> str:
        """What was held back, when no stop string came."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, window: str) -> tuple[int, int] | None:
        """Start and end of the stop string with the earliest end. None starts before the window: its beginning would be held."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[1] or (end == best[1] and start < best[0]):
                best = (start, end)
        return best

    def _start_of_held(self, window: str) -> int:
        """Where the longest end of the window begins that is also a proper beginning of a stop string."""
        for start in range(max(0, len(window) - self._longest + 1), len(window)):
            if window[start] in self._firsts and any(stop.startswith(window[start:]) for stop in self._stops):
                return start
        return len(window)


class Detokenizer(Protocol):
    """Tokens to text that is certain: no torn characters, nothing taken back."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


def detokenizer(tokenizer: Tokenizer | NoTokenizer, *, skip_special_tokens: bool) -> Detokenizer:
    """By table where the model's decoder works on bytes, else by a window over its decoder; no text without a tokenizer."""
    if isinstance(tokenizer, NoTokenizer):
        return NoText()
    table = tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
    if table is not None:
        return ByteDetokenizer(table, EACH_BYTE if tokenizer.has_byte_fallback else "replace")
    return WindowDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)


class NoText:
    """For tokens that nobody here can read."""

    __slots__ = ()

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


EACH_BYTE = "baton-each-byte"
register_error(EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class ByteDetokenizer:
    """Joins the tokens' bytes and decodes UTF-8; bytes of a torn character wait for the rest of it. Invalid bytes become U+FFFD: one for
    each maximal part, as the Unicode standard recommends, which for byte-level models is what the whole sequence decodes to; or
    (`errors`: `EACH_BYTE`) one for each byte, as SentencePiece decodes its byte tokens."""

    __slots__ = ("_errors", "_rest", "_table")

    def __init__(self, table: list[bytes], errors: str) -> None:
        self._table = table
        self._errors = errors
        self._rest = b""

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = self._rest + b"".join([table[token_id] for token_id in token_ids])
        except IndexError:  # ids of padding rows that no token has
            data = self._rest + b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])
        text, used = utf_8_decode(data, self._errors, False)
        self._rest = data[used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._rest, self._errors, True)
        self._rest = b""
        return text


class WindowDetokenizer:
    """For decoders that need to see neighbours: decodes the tokens not yet given out behind those given out last, and gives the
    difference. Works token by token, so grouping does not matter."""

    __slots__ = ("_given", "_ids", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the last tokens given out, as context, then those that wait
        self._given = 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._take()

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        is_torn = self._decode(self._ids).endswith("\ufffd")
        if is_torn and len(self._ids) - self._given <= LONGEST_TORN_CHARACTER_TOKENS:
            return ""
        return self._take()

    def _take(self) -> str:
        before = self._decode(self._ids[: self._given])
        whole = self._decode(self._ids)
        if len(whole) <= len(before):
            del self._ids[self._given :]  # these tokens have no text
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return whole[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
