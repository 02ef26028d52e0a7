"""`Backend`: what it gives out is certain, whole, and the same however tokens were grouped."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backend import Backend, StopStrings, WindowDetokenizer
from pipeline.protocol import BackendInput, FinishReason, OutputOptions, SamplingOptions, StopConditions
from tests import texts

FAMILIES = ["byte_level", "byte_fallback", "word_piece"]


def request(
    *,
    stop: list[str] | None = None,
    include: bool = False,
    skip_special: bool = True,
    eos: list[int] | None = None,
    stop_token_ids: list[int] | None = None,
    min_tokens: int | None = None,
) -> BackendInput:
    return BackendInput(
        request_id="r",
        model="m",
        token_ids=[1],
        stop_conditions=StopConditions(max_tokens=100, stop=stop, stop_token_ids=stop_token_ids, min_tokens=min_tokens),
        sampling_options=SamplingOptions(include_stop_str_in_output=include),
        output_options=OutputOptions(skip_special_tokens=skip_special),
        eos_token_ids=eos or [],
    )


def grouped(token_ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(token_ids), *[cut % (len(token_ids) + 1) for cut in cuts]})
    return [token_ids[start:end] for start, end in pairwise(edges)]


def run(backend: Backend, groups: list[list[int]]) -> tuple[str, int, bool]:
    """Text, accepted tokens, stopped: as a caller uses it, which stops pushing at a stop."""
    text, accepted = "", 0
    for group in groups:
        pushed = backend.push(group)
        text, accepted = text + pushed.delta, accepted + pushed.accepted
        if pushed.stopped:
            return text, accepted, True
    return text + backend.finish(), accepted, False


def reference_cut(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Character by character: the stop string that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending)), end
    return None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tokens_give_the_same_text_in_any_grouping(family: str, data: st.DataObject) -> None:
    tokenizer = texts.tokenizer(family)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    stops = data.draw(st.lists(st.sampled_from(["a", "the", "\ufffd", " ", "END", "e f"]), max_size=3))
    one_by_one = run(Backend(tokenizer, request(stop=stops, skip_special=skip)), [[token_id] for token_id in ids])
    for _ in range(3):
        cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
        assert run(Backend(tokenizer, request(stop=stops, skip_special=skip)), grouped(ids, cuts)) == one_by_one


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_byte_level_text_is_what_the_whole_sequence_decodes_to(data: st.DataObject) -> None:
    tokenizer = texts.tokenizer("byte_level")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    skip = data.draw(st.booleans())
    text, accepted, stopped = run(Backend(tokenizer, request(skip_special=skip)), [ids[:7], ids[7:8], ids[8:]])
    assert (text, accepted, stopped) == (tokenizer.decode(ids, skip_special_tokens=skip), len(ids), False)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", texts.HARD_TEXTS)
def test_no_piece_holds_half_a_character(family: str, text: str) -> None:
    tokenizer = texts.tokenizer(family)
    backend = Backend(tokenizer, request())
    pieces = [backend.push([token_id]).delta for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces).removeprefix(" ") == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert backend.finish() == ""


@pytest.mark.parametrize("text", [text for text in texts.HARD_TEXTS if text.isascii()])
def test_a_decoder_that_needs_neighbours_gives_the_whole_text(text: str) -> None:
    tokenizer = texts.tokenizer("word_piece")
    backend = Backend(tokenizer, request())
    assert isinstance(backend._detokenizer, WindowDetokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert run(backend, [[token_id] for token_id in ids])[0] == tokenizer.decode(ids)


def test_a_torn_character_at_the_end_shows_as_replacement() -> None:
    tokenizer = texts.tokenizer("byte_level")
    torn = tokenizer.encode("🧪", add_special_tokens=False)[:-1]
    backend = Backend(tokenizer, request())
    assert torn
    assert backend.push(torn).delta == ""
    assert backend.finish() == tokenizer.decode(torn) == "\ufffd"


def test_byte_fallback_never_takes_back_what_it_gave() -> None:
    tokenizer = texts.tokenizer("byte_fallback")
    vocab = texts.byte_fallback().get_vocab()
    backend = Backend(tokenizer, request())
    given = [backend.push([vocab[name]]).delta for name in ("<0x41>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x42>")]
    assert given == ["A", "", "", "€", "\ufffd", "B"]


def test_byte_fallback_replaces_each_byte_of_a_torn_character_as_its_decoder_does() -> None:
    tokenizer = texts.tokenizer("byte_fallback")
    vocab = texts.byte_fallback().get_vocab()
    torn = [vocab[name] for name in ("a", "<0xF0>", "<0x9F>", "<0x8E>")]
    for ids in (torn, [*torn, vocab["b"]]):
        assert run(Backend(tokenizer, request()), grouped(ids, [2]))[0] == tokenizer.decode(ids)


def test_a_token_that_only_looks_like_a_byte_is_text() -> None:
    hf = texts.byte_fallback.__wrapped__()  # one of its own, to add to
    hf.add_tokens(["<0xZZ>"])
    tokenizer = texts.Tokenizer(hf)
    ids = [hf.get_vocab()["<0xZZ>"]]
    assert Backend(tokenizer, request()).push(ids).delta == tokenizer.decode(ids) == "<0xZZ>"


def test_padding_rows_of_the_model_have_no_text() -> None:
    tokenizer = texts.tokenizer("byte_level", vocab_size=4096)
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert Backend(tokenizer, request()).push([*hello, 4000, 5000]).delta == "Hello"


def stop_cases() -> list[tuple[str, list[str], int]]:
    """Texts with stop strings cut from them or near to them, so that beginnings and overlaps abound."""
    rng = random.Random(7)
    cases = []
    for number in range(240):
        text = "".join(rng.choice([*texts.HARD_TEXTS, "abcabcabd ", "aaaab", "END. EN", "\n\nUser:"]) for _ in range(3))
        stops = []
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(text))
            stop = text[start : start + rng.randint(1, 9)]
            stops.append(stop + "#" if rng.random() < 0.4 else stop)
        cases.append((text, stops, number))
    return cases


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_cut_where_the_reference_cuts(family: str, include: bool) -> None:
    tokenizer = texts.tokenizer(family)
    for text, stops, seed in stop_cases():
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = run(Backend(tokenizer, request()), [ids])[0]
        cut = reference_cut(whole, stops)
        rng = random.Random(seed)
        groups = grouped(ids, [rng.randrange(len(ids) + 1) for _ in range(rng.randint(0, 8))])
        got = run(Backend(tokenizer, request(stop=stops, include=include)), groups)
        if cut is None:
            assert got == (whole, len(ids), False)
            continue
        needed = next(k for k in range(1, len(ids) + 1) if len(certain_text(tokenizer, ids[:k])) >= cut[1])
        assert got == (whole[: cut[1] if include else cut[0]], needed, True)


def certain_text(tokenizer: texts.Tokenizer, ids: list[int]) -> str:
    return Backend(tokenizer, request()).push(ids).delta


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab🎉", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab🎉", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_exactly_what_could_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops, include=False)
    seen = given_out = ""
    for piece in pieces:
        delta, stopped = watch.push(piece)
        seen, given_out = seen + piece, given_out + delta
        cut = reference_cut(seen, stops)
        if cut is not None:
            assert (given_out, stopped, watch.found) == (seen[: cut[0]], True, seen[cut[0] : cut[1]])
            return
        begins = [stop[:length] for stop in stops for length in range(1, len(stop))]
        held = max((len(begin) for begin in begins if seen.endswith(begin)), default=0)
        assert (given_out, stopped) == (seen[: len(seen) - held], False)
    assert given_out + watch.finish() == seen
    assert watch.found is None


def test_stop_strings_count_from_the_least_number_of_tokens_on() -> None:
    tokenizer = texts.tokenizer("byte_level")
    ids = [
        token_id
        for word in ("one", " END", " two", " END", " x")
        for token_id in tokenizer.encode(word, add_special_tokens=False)
    ]
    first = len(tokenizer.encode("one END", add_special_tokens=False))
    for groups in ([ids], [[token_id] for token_id in ids]):
        assert run(Backend(tokenizer, request(stop=[" END"], min_tokens=first)), groups)[0] == "one"
        assert run(Backend(tokenizer, request(stop=[" END"], min_tokens=first + 1)), groups)[0] == "one END two"


def test_nothing_follows_a_stop() -> None:
    tokenizer = texts.tokenizer("byte_level")
    backend = Backend(tokenizer, request(stop=["END"]))
    stopped = backend.push(tokenizer.encode("one END two", add_special_tokens=False))
    assert (stopped.delta, stopped.stopped) == ("one ", True)
    again = backend.push(tokenizer.encode("three", add_special_tokens=False))
    assert (again.delta, again.accepted, again.stopped) == ("", 0, True)


@pytest.mark.parametrize(
    ("reason", "include", "is_text"),
    [
        (FinishReason.EOS, False, False),
        (FinishReason.STOP, False, False),
        (FinishReason.STOP, True, True),
        (FinishReason.LENGTH, False, True),
        (None, False, True),
    ],
)
def test_a_token_that_ends_a_choice_by_its_id_is_accepted_but_no_text(
    reason: FinishReason | None, include: bool, is_text: bool
) -> None:
    tokenizer = texts.tokenizer("byte_level")
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    pushed = Backend(tokenizer, request(stop_token_ids=[ids[-1]], include=include)).push(ids, reason)
    assert pushed.accepted == len(ids)
    assert pushed.delta == tokenizer.decode(ids if is_text else ids[:-1])


def test_special_tokens_show_only_when_asked() -> None:
    tokenizer = texts.tokenizer("byte_level")
    ids = tokenizer.encode("<|im_start|>Hello<think><|im_end|>", add_special_tokens=False)
    assert Backend(tokenizer, request()).push(ids).delta == "Hello<think>"
    shown = Backend(tokenizer, request(skip_special=False)).push(ids).delta
    assert shown == "<|im_start|>Hello<think><|im_end|>"
