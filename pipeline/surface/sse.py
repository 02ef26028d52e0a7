"""Server-sent events as clients need them (each point broke one of them): `\\n` as separator, no `id:` lines unless asked for, no event
without data, a comment as one line without a blank one behind it, and an end that says so.
"""

from __future__ import annotations

from typing import Any

import msgspec

PING = b": ping\n"  # with a blank line it would be an empty event to clients that have seen other fields

_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_encode = msgspec.json.Encoder().encode


def text_json(text: str) -> bytes:
    """A JSON string without any character that some client takes for the end of a line."""
    data = _encode(text)
    return data if text.isascii() else one_line(data)


def one_line(data: bytes) -> bytes:
    """The same JSON on one line for every client."""
    for char, escaped in _LINE_ENDS:
        data = data.replace(char, escaped)
    return data


def line_json(value: Any) -> bytes:
    """A value as JSON on one line for every client."""
    return one_line(_encode(value))
