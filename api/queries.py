"""What routes that read have in common: their methods, and values in the query of a URL. What one cannot mean is a 400 that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import InvalidRequest

READ = ["GET", "HEAD"]
LARGEST = 2**53 - 1


def flag(query: Mapping[str, str], name: str) -> bool:
    """`true` or `false`, which is also what is not given."""
    return word(query, name, ("false", "true")) == "true"


def word(query: Mapping[str, str], name: str, words: Sequence[str]) -> str:
    """One of `words`; the first of them is what is not given."""
    value = query.get(name, words[0])
    if value not in words:
        raise InvalidRequest(f"{name}: expected {' or '.join(words)}, not {value[:100]!r}", param=name)
    return value


def number(query: Mapping[str, str], name: str, default: int, *, least: int, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`."""
    value = query.get(name)
    if value is None:
        return default
    is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(LARGEST))
    if not is_number or not least <= int(value) <= most:
        limit = f"from {least}" + (f" to {most}" if most < LARGEST else "")
        raise InvalidRequest(f"{name}: expected a number {limit}, not {value[:100]!r}", param=name)
    return int(value)
