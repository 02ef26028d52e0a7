"""Streamed text against the whole: 500 sequences of tokens a tokenizer, and 500 with stop strings. What is expected is made without
`Backend`: by the decoder of the `tokenizers` library on the whole sequence, and by `str.find`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import groupby

import pytest

from pipeline.backend import Backend
from pipeline.builtin import BUILTIN_MODEL
from pipeline.protocol import BackendInput, OutputOptions, SamplingOptions, StopConditions
from pipeline.tokenizer import Tokenizer
from tests import texts

SEQUENCES = STOP_CASES = 500
FAMILIES = [BUILTIN_MODEL, "byte_level", "byte_fallback", "word_piece"]
SNIPPETS = [
    "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🇩🇪", "❤️", "🎉🎉", "漢字", "かな", "한국어", "𠮷", "e\u0301", "n\u0303o", "Z̷̡͝a",
    "हिन्दी", "ไทย", "עברית", "Ægir", "naïve", "the runner", " passes", " END", "\n\n", "\t", "  ", "…", "“", "12 + 3",
    "<|end|>", "</s>", "\u200d", "\ufe0f", "\u2028", "\ufffd",
]  # fmt: skip
BYTE = re.compile(r"^<0x([0-9A-F]{2})>$")


def tokenizer_of(family: str) -> Tokenizer:
    return Tokenizer.load(family) if family == BUILTIN_MODEL else texts.tokenizer(family)


def request(stops: list[str] | None, *, skip: bool, include: bool = False) -> BackendInput:
    return BackendInput(
        request_id="r",
        model="m",
        token_ids=[1],
        stop_conditions=StopConditions(max_tokens=1000, stop=stops),
        sampling_options=SamplingOptions(include_stop_str_in_output=include),
        output_options=OutputOptions(skip_special_tokens=skip),
    )


def special_ids(tokenizer: Tokenizer) -> list[int]:
    return [index for index, token in tokenizer._backend.get_added_tokens_decoder().items() if token.special]


def sequence(rng: random.Random, tokenizer: Tokenizer, *, torn: bool) -> list[int]:
    """Words, characters of many tokens, special tokens and, if `torn`, pieces of characters and any ids at all."""
    kinds = ["snippet"] * 5 + ["special"] + (["torn", "any", "any"] if torn else [])
    ids: list[int] = []
    for _ in range(rng.randint(1, 14)):
        snippet = tokenizer.encode("".join(rng.choices(SNIPPETS, k=rng.randint(1, 3))), add_special_tokens=False)
        match rng.choice(kinds):
            case "snippet":
                ids += snippet
            case "special":
                ids.append(rng.choice(special_ids(tokenizer)))
            case "torn":
                start = rng.randrange(len(snippet) + 1)
                ids += snippet[start : rng.randint(start, len(snippet))]
            case "any":
                ids += rng.choices(range(tokenizer.known_tokens), k=rng.randint(1, 6))
    return ids


def chunks(rng: random.Random, ids: list[int]) -> list[list[int]]:
    """The sequence in pieces of 0 to 5 tokens."""
    found: list[list[int]] = []
    at = 0
    while at < len(ids):
        count = rng.randint(0, 5)
        found.append(ids[at : at + count])
        at += count
    return found


def decoded(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool) -> str:
    """What the library decodes the whole sequence to. A continuation keeps its first space, so it stands behind a word."""
    word = tokenizer.encode("word", add_special_tokens=False)
    behind = tokenizer.decode([*word, *ids], skip_special_tokens=skip)
    is_sentence_piece = tokenizer.decode(word) == "word" and tokenizer.token_strs(word)[0].startswith("▁")
    return behind.removeprefix("word") if is_sentence_piece else tokenizer.decode(ids, skip_special_tokens=skip)


def expected(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool) -> str:
    """As `decoded`, but for byte tokens as SentencePiece itself decodes them: a byte that belongs to no character is U+FFFD and spoils
    nothing else. The library makes U+FFFD of all bytes that stand together where one of them is torn, which would take back text."""
    hidden = set(special_ids(tokenizer)) if skip else set()
    shown = [token_id for token_id in ids if token_id not in hidden]
    names = dict(zip(shown, tokenizer.token_strs(shown), strict=True))
    if not any(BYTE.match(name) for name in names.values()):
        return decoded(tokenizer, shown, skip=False)
    text = ""
    for is_bytes, run in groupby(shown, lambda token_id: bool(BYTE.match(names[token_id]))):
        part = list(run)
        text += characters(byte_run(names[one] for one in part)) if is_bytes else decoded(tokenizer, part, skip=False)
    return text


def byte_run(names: object) -> bytes:
    return bytes(int(BYTE.match(name)[1], 16) for name in names)  # type: ignore[attr-defined, index]


def characters(data: bytes) -> str:
    text = ""
    while data:
        for length in range(1, 5):
            try:
                text, data = text + data[:length].decode(), data[length:]
                break
            except UnicodeDecodeError:
                pass
        else:
            text, data = text + "\ufffd", data[1:]
    return text


def streamed(backend: Backend, pieces: list[list[int]]) -> tuple[str, int, bool]:
    """Text, accepted tokens, and whether a stop string ended it."""
    text, accepted = "", 0
    for piece in pieces:
        pushed = backend.push(piece)
        text, accepted = text + pushed.delta, accepted + pushed.accepted
        if pushed.stopped:
            return text, accepted, True
    text += backend.finish()
    return text, accepted, backend.stop_string is not None


@pytest.mark.parametrize("torn", [False, True], ids=["whole-characters", "anything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_text_is_the_text_of_the_whole_sequence(family: str, torn: bool) -> None:
    tokenizer = tokenizer_of(family)
    is_exact = 0
    for seed in range(SEQUENCES):
        rng = random.Random(seed)
        ids, skip = sequence(rng, tokenizer, torn=torn), seed % 2 == 0
        text, accepted, stopped = streamed(Backend(tokenizer, request(None, skip=skip)), chunks(rng, ids))
        whole = decoded(tokenizer, ids, skip=skip)
        assert (text, accepted, stopped) == (expected(tokenizer, ids, skip=skip), len(ids), False), (seed, ids)
        is_exact += text == whole
    assert is_exact == SEQUENCES or (family == "byte_fallback" and torn and is_exact > SEQUENCES / 4), is_exact


def stops_for(rng: random.Random, whole: str) -> list[str]:
    """One to four: cut from the text wherever characters, tokens and emoji meet, many of them with another last character."""
    stops: list[str] = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(max(1, len(whole)))
        cut = whole[start : start + rng.randint(1, 12)] or "none"
        stops.append(rng.choice([cut, cut, cut[:-1] + "#", cut + "\u0301", rng.choice(SNIPPETS)]))
    return stops


def first_cut(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first, the longer one where two are."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    end, start = min(found, default=(0, 0))
    return (start, end) if found else None


@pytest.mark.parametrize("torn", [False, True], ids=["whole-characters", "anything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_text_ends_where_the_first_stop_string_does(family: str, torn: bool) -> None:
    tokenizer = tokenizer_of(family)
    crossing = 0
    for seed in range(STOP_CASES):
        rng = random.Random(seed)
        ids, skip, include = sequence(rng, tokenizer, torn=torn), seed % 2 == 0, seed % 4 < 2
        whole = expected(tokenizer, ids, skip=skip)
        stops = stops_for(rng, whole)
        backend = Backend(tokenizer, request(stops, skip=skip, include=include))
        text, accepted, stopped = streamed(backend, chunks(rng, ids))
        cut = first_cut(whole, stops)
        if cut is None:
            assert (text, accepted, stopped) == (whole, len(ids), False), (seed, ids, stops)
            continue
        start, end = cut
        assert (text, stopped, backend.stop_string) == (whole[: end if include else start], True, whole[start:end]), (
            seed, ids, stops,
        )  # fmt: skip
        if "\ufffd" not in whole[:end]:
            needed = next(
                k for k in range(len(ids) + 1) if expected(tokenizer, ids[:k], skip=skip)[:end] == whole[:end]
            )
            assert accepted == needed, (seed, ids, stops)
            crossing += len(expected(tokenizer, ids[: needed - 1], skip=skip).rstrip("\ufffd")) > start
    assert crossing > STOP_CASES / 10, "many stop strings begin in one token and end in another"
