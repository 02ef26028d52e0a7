"""Grammars as xgrammar (EBNF) and llama.cpp (GBNF) write them, `root ::= "a" | [b-z]+`, turned to the Lark that llguidance reads.

llguidance's own converter does it. In front of it the text becomes what that reads: without comments, a `|` at the beginning of a line on
the line before, characters instead of their numbers.
"""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

MOST_CHARS = 32_768  # the converter takes up to half a second for so many, and longer by their square

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_PARTS = re.compile(
    r"""(?P<text>"(?:\\.|[^"\\])*+(?:"|\\?\Z))
      | (?P<set>\[(?:\\.|[^\]\\])*+(?:\]|\\?\Z))
      | (?P<gap>(?>\s|\#[^\n]*+)++)(?P<bar>\|?)""",
    re.VERBOSE | re.DOTALL,
)
_CHARS = re.compile(
    r"""\\(?: x(?P<x>[0-9a-fA-F]{2})
          | u(?![dD][89a-fA-F])(?P<u>[0-9a-fA-F]{4})
          | U(?!0000[dD][89a-fA-F])(?P<U>[0-9a-fA-F]{8})
          | (?P<mark>[^\w\s]) )
      | (?P<bare>[&~])""",
    re.VERBOSE,
)  # halves of UTF-16 are no characters
_WITH_MEANING = frozenset('"\\[]^-&~')  # in texts or sets of characters, here or in Lark


def is_ebnf(grammar: str) -> bool:
    """Whether there is a rule that begins as only EBNF's do."""
    return _RULE.search(grammar) is not None


def lark_of(grammar: str) -> str:
    """The same in Lark. Raises `ValueError` with what cannot be read."""
    if len(grammar) > MOST_CHARS:
        raise ValueError(f"it has {len(grammar)} characters, and EBNF may have {MOST_CHARS} at most: write it in Lark")
    try:
        return gbnf_to_lark(_PARTS.sub(_readable, grammar))
    except RecursionError as error:
        raise ValueError("as EBNF it is nested too deeply") from error
    except (
        Exception
    ) as error:  # the converter has no error of its own for names, and fails by chance where a text breaks off
        raise ValueError(f"it cannot be read as EBNF: {error}") from error


def _readable(part: re.Match[str]) -> str:
    if part["gap"] is None:
        return _CHARS.sub(_char, part[0])
    return " |" if part["bar"] else "\n" if "\n" in part["gap"] else " "


def _char(found: re.Match[str]) -> str:
    """One character, as both sides read it."""
    number = found["x"] or found["u"] or found["U"]
    char = chr(int(number, 16)) if number else found["mark"] or found["bare"]
    return f"\\x{ord(char):02x}" if char in _WITH_MEANING or ord(char) < 32 else char
