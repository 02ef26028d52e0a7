"""A part of something, by the `Range` header: one range of bytes. Several, or another unit, are answered with all of it, as HTTP allows."""

from __future__ import annotations

import re
from typing import NamedTuple

from pipeline.errors import InvalidRequest

_ONE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


class Span(NamedTuple):
    """From `start` up to `stop`."""

    start: int
    stop: int

    def of(self, size: int) -> str:
        """As `Content-Range` has it."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"


def span_of(header: str | None, size: int) -> Span | None:
    """What is asked for of so many bytes; None: all of it. Raises InvalidRequest (range_not_satisfiable) where nothing of it is there."""
    found = _ONE.fullmatch(header.strip()) if header is not None else None
    first, last = found.groups() if found else ("", "")
    if not first and not last:
        return None
    if first and last and int(last) < int(first):
        return None
    span = (
        Span(int(first), min(int(last) + 1, size) if last else size) if first else Span(max(0, size - int(last)), size)
    )
    if span.start >= span.stop:
        raise InvalidRequest(
            f"the file has {size} bytes, and none of the range", param="Range", code="range_not_satisfiable"
        )
    return span
