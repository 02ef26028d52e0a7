"""The input of a batch: every line is found wherever blocks end, and what is wrong is told by its line."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.batches.lines import (
    BOM,
    FORMS,
    LONGEST_ID,
    MOST_ERRORS,
    BadLine,
    Findings,
    RawLine,
    check,
    line_of,
    raw_lines,
)
from pipeline.batches.record import LineError
from pipeline.errors import ModelNotFound, NotAllowed
from tests.batches.running import CHATS, TEXTS, chat_line, text_line
from tests.system import POOL

LONGEST = 1200
pieces = st.sampled_from([b"a", b"{}", b" ", b"\t", b"\r", b"\n", b"\r\n", BOM, b"\xff", b"x" * 9, b"\x00"])


async def blocks_of(blocks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block


def raw(blocks: Iterable[bytes], longest: int = LONGEST, **begin: int) -> list[RawLine]:
    async def collect() -> list[RawLine]:
        return [line async for line in raw_lines(blocks_of(blocks), longest, **begin)]

    return asyncio.run(collect())


def reference(data: bytes, longest: int) -> list[RawLine]:
    """The same of a file that is held as a whole."""
    found, offset = [], 0
    for number, line in enumerate(data.split(b"\n")):
        said = line.removeprefix(BOM) if offset == 0 else line
        if len(line) > longest:
            found.append(RawLine(number, offset, None))
        elif said.strip():  # a mark alone is nothing
            found.append(RawLine(number, offset, said.removesuffix(b"\r")))
        offset += len(line) + 1
    return found


@given(st.lists(pieces, max_size=30).map(b"".join), st.integers(1, 12), st.lists(st.integers(0, 60), max_size=6))
@example(BOM + b"a\r\nb", 9, [1, 2, 3])
@example(BOM + b"\n\na", 9, [])
def test_lines_are_the_same_wherever_blocks_end(data: bytes, longest: int, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *[min(cut, len(data)) for cut in cuts]})
    blocks = [data[begin:end] for begin, end in pairwise(edges)]
    expected = reference(data, longest)
    assert raw(blocks, longest) == expected
    assert raw([data[at : at + 1] for at in range(len(data))], longest) == expected


@given(st.lists(pieces, max_size=30).map(b"".join))
def test_reading_goes_on_from_the_offset_and_number_of_any_line(data: bytes) -> None:
    whole = raw([data])
    for at, line in enumerate(whole):
        assert raw([data[line.offset :]], number=line.number, offset=line.offset) == whole[at:]


def test_numbers_count_blank_lines_and_offsets_are_those_of_the_file() -> None:
    data = BOM + b"one\r\n\r\n   \ntwo"
    assert raw([data]) == [RawLine(0, 0, b"one"), RawLine(3, 14, b"two")]
    assert data[14:] == b"two"


def test_of_a_line_that_is_too_long_nothing_is_kept() -> None:
    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 2**20
        yield b"\nlast"

    async def collect() -> list[RawLine]:
        return [line async for line in raw_lines(blocks(), 2**21)]

    tracemalloc.start()
    try:
        assert asyncio.run(collect()) == [RawLine(0, 0, None), RawLine(1, 100 * 2**20 + 1, b"last")]
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


# -- check ----------------------------------------------------------------------------------------------------------------


def serves(model: str) -> None:
    """One model is served, and one is not for this key."""
    if model == "secret":
        raise NotAllowed("the API key may not use the model 'secret'")
    if model != POOL:
        raise ModelNotFound(f"model {model!r} does not exist", param="model")


def checked(lines: Iterable[bytes | dict[str, Any]], endpoint: str = TEXTS, most_lines: int = 500) -> Findings:
    data = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)

    async def find() -> Findings:
        found = raw_lines(blocks_of([data]), LONGEST)
        return await check(found, endpoint, most_lines=most_lines, longest=LONGEST, serves=serves)

    return asyncio.run(find())


def only_error(findings: Findings) -> LineError:
    (error,) = findings.errors
    return error


def changed(**fields: Any) -> dict[str, Any]:
    """A line with other fields; without those that are None."""
    return {name: value for name, value in (text_line("second") | fields).items() if value is not None}


BAD: dict[str, tuple[bytes | dict[str, Any], str, str | None]] = {
    "not JSON": (b"nonsense\n", "invalid_json_line", None),
    "half a line": (b'{"custom_id": "a", "url"\n', "invalid_json_line", None),
    "invalid UTF-8": (b'{"custom_id": "\xff", "url": "/v1/completions", "body": {}}\n', "invalid_json_line", None),
    "invalid UTF-8 in the body": (
        json.dumps(text_line("second", prompt="HERE")).encode().replace(b"HERE", b"\xff\xfe") + b"\n",
        "invalid_request",
        "body",
    ),
    "half a pair": (
        b'{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}\n',
        "invalid_json_line",
        None,
    ),
    "no object": (b"[]\n", "invalid_line", None),
    "deep": (b"[" * 900 + b"\n", "invalid_line", None),
    "deep body": (
        b'{"custom_id": "a", "url": "/v1/completions", "body": ' + b"[" * 450 + b"]" * 450 + b"}\n",
        "invalid_request",
        "body",
    ),
    "too long": (b'{"custom_id": "' + b"x" * LONGEST + b'"}\n', "line_too_long", None),
    "no custom_id": (changed(custom_id=None), "invalid_line", "custom_id"),
    "custom_id is no string": (changed(custom_id=7), "invalid_line", "custom_id"),
    "custom_id is empty": (changed(custom_id=""), "invalid_custom_id", "custom_id"),
    "custom_id is long": (changed(custom_id="x" * (LONGEST_ID + 1)), "invalid_custom_id", "custom_id"),
    "custom_id is another's": (changed(custom_id="first"), "duplicate_custom_id", "custom_id"),
    "GET": (changed(method="GET"), "invalid_method", "method"),
    "no url": (changed(url=None), "invalid_line", "url"),
    "another url": (chat_line("second"), "mismatched_url", "url"),
    "no body": (changed(body=None), "invalid_line", "body"),
    "no model": (changed(body={"prompt": "x"}), "invalid_request", "body.model"),
    "stream": (text_line("second", stream=True), "invalid_request", "body.stream"),
    "wrong field": (text_line("second", max_tokens=0), "invalid_request", "body.max_tokens"),
    "unknown model": (text_line("second", model="other"), "model_not_found", "body.model"),
    "a model of others": (text_line("second", model="secret"), "permission_denied", "body.model"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named(what: str) -> None:
    line, code, param = BAD[what]
    findings = checked([text_line("first"), b"\n", line, text_line("third")])
    error = only_error(findings)
    assert (error.line, error.code, error.param) == (3, code, param), error
    assert len(error.message) < 500
    assert findings.total == 3


def test_a_line_that_is_nested_too_deeply_is_named() -> None:
    for deep in (b'{"x": ' + b"[" * 100_000, b'{"custom_id": "a", "url": "/v1/completions", "body": ' + b"[" * 100_000):
        with pytest.raises(BadLine) as caught:
            line_of(RawLine(0, 0, deep), 10**6)
        assert (caught.value.error.line, caught.value.error.code) == (1, "invalid_json_line")


def test_good_lines_are_counted_and_their_models_known() -> None:
    findings = checked([BOM, json.dumps(text_line("a")).encode() + b"\r\n\r\n", json.dumps(text_line("b")).encode()])
    assert findings == Findings(lines=3, total=2, models={POOL})
    assert checked([text_line("x" * LONGEST_ID, prompt="x")]).errors == []


@pytest.mark.parametrize("data", [b"", b"\n \r\n\t", BOM, BOM + b"\r\n"])
def test_a_file_without_requests_is_empty(data: bytes) -> None:
    error = only_error(checked([data]))
    assert (error.code, error.line) == ("empty_file", None)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_form_is_told_once(form: bytes) -> None:
    error = only_error(checked([form + b"\n" * 9 + b"x\ny\n"]))
    assert (error.code, error.line) == ("invalid_file", 1)
    assert FORMS[form] in error.message


def test_one_request_too_many_ends_the_reading() -> None:
    findings = checked([*[text_line(str(number)) for number in range(5)], b"nonsense\n"], most_lines=4)
    error = only_error(findings)
    assert (error.code, error.line) == ("too_many_requests", 5)
    assert checked([text_line(str(number)) for number in range(4)], most_lines=4).errors == []


def test_no_more_errors_are_told_than_a_hundred() -> None:
    findings = checked([b"nonsense\n"] * 300)
    assert [error.line for error in findings.errors] == list(range(1, MOST_ERRORS + 1))
    assert (findings.total, MOST_ERRORS) == (300, 100)


def test_nothing_is_kept_of_the_models_that_nobody_serves() -> None:
    def refuses(model: str) -> None:
        raise ModelNotFound(f"model {model[:10]!r} does not exist")

    async def blocks() -> AsyncIterator[bytes]:
        for number in range(500):
            line = text_line(str(number), model=f"{number} {'x' * 2**17}")
            yield json.dumps(line).encode() + b"\n"

    async def find() -> Findings:
        found = raw_lines(blocks(), 2**20)
        return await check(found, TEXTS, most_lines=500, longest=2**20, serves=refuses)

    tracemalloc.start()
    try:
        assert len(asyncio.run(find()).errors) == MOST_ERRORS
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_the_real_limit_of_requests() -> None:
    lines = [
        b'{"custom_id":"%d","url":"/v1/completions","body":{"model":"baton-tiny","prompt":""}}\n' % number
        for number in range(50_001)
    ]
    assert checked(lines[:-1], most_lines=50_000) == Findings(lines=50_000, total=50_000, models={POOL})
    error = only_error(checked(lines, most_lines=50_000))
    assert (error.code, error.line) == ("too_many_requests", 50_001)


def test_chats_are_read_as_chats() -> None:
    assert checked([chat_line("a")], CHATS).errors == []
    error = only_error(checked([chat_line("a", messages=[])], CHATS))
    assert (error.code, error.param) == ("invalid_request", "body.messages")


def test_a_line_is_what_it_says() -> None:
    found = line_of(RawLine(4, 9, json.dumps(text_line("id", prompt="x")).encode()), LONGEST)
    assert (found.number, found.custom_id, found.url) == (4, "id", TEXTS)
    assert json.loads(found.body) == text_line("id", prompt="x")["body"]
