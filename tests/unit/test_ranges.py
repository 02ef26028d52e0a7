"""Ranges of bytes, as RFC 9110 has them."""

from __future__ import annotations

import pytest

from api.ranges import Span, span_of
from pipeline.errors import InvalidRequest


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=0-9", (0, 10)), ("bytes=0-99", (0, 10)), ("bytes=3-", (3, 10)), ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)), ("BYTES = 1 - 2 ", (1, 3)), ("bytes=9-9", (9, 10)),
        (None, None), ("", None), ("bytes=", None), ("bytes=-", None), ("bytes=5-3", None), ("bytes=0-1,3-4", None), ("lines=0-1", None),
        ("bytes=a-b", None), ("bytes=٣-٤", None), ("bytes=" + "9" * 100 + "-", None),
    ],
)  # fmt: skip
def test_a_range(header: str | None, span: tuple[int, int] | None) -> None:
    assert span_of(header, 10) == (None if span is None else Span(*span))


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)]
)
def test_a_range_that_is_not_there(header: str, size: int) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        span_of(header, size)
    assert wrong.value.code == "range_not_satisfiable"


def test_how_a_range_is_told() -> None:
    assert Span(2, 5).of(10) == "bytes 2-4/10"
