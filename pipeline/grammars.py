"""Grammars that an answer has to follow, as llguidance reads them, and what is wrong with one. Texts only: no tokens, no engine.

JSON comes without spaces between its tokens: a model that may write them can write them for ever. A schema whose keywords are not
all understood is refused, for what is not understood would not be followed. Neither is a schema's to change: llguidance takes options from
it (`x-guidance`), and clients write schemas.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from pipeline.ebnf import is_ebnf, lark_of
from pipeline.errors import InvalidRequest
from pipeline.features import GUIDED_DECODING, refuse_unserved
from pipeline.protocol import GuidedDecoding

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # which is in its stub alone

LONGEST_FAULT = 400  # characters of what llguidance says
OURS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": None,
    "whitespace_flexible": False,
    "lenient": False,
}
BY_LLGUIDANCE = ("torch",)  # engines; others have grammars of their own and check them themselves
_LARK = re.compile(r"^[ \t]*(?:%llguidance\b|[?!]*start\b[^:\n]*:)", re.MULTILINE)


def grammar_of(guided: GuidedDecoding) -> str:
    """llguidance's grammar of a constraint. Raises `ValueError` for a schema that is no JSON, a grammar that is neither Lark nor EBNF, and
    a constraint of nothing."""
    match guided:
        case GuidedDecoding(json=str(schema)):
            return _grammar_of_schema(schema)
        case GuidedDecoding(regex=str(regex)):
            return LLMatcher.grammar_from_regex(regex)
        case GuidedDecoding(choice=[_, *_] as choices):
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(json.dumps(choice) for choice in choices)}")
        case GuidedDecoding(grammar=str(grammar)):
            return LLMatcher.grammar_from_lark(_lark(grammar))
    raise ValueError("it asks for nothing: one of json, regex, choice and grammar is needed")


def fault_of(guided: GuidedDecoding) -> str | None:
    """Why there is no grammar in this constraint; None where there is one. Takes as long as compiling it: up to a tenth of a second."""
    try:
        fault: str = LLMatcher.validate_grammar(grammar_of(guided))
    except ValueError as error:
        fault = str(error)
    return shortened(fault) or None


def refuse_unusable(engine: str, guided: GuidedDecoding, param: str) -> None:
    """Raise `InvalidRequest` naming the field of a body whose constraint this engine does not serve, or whose grammar is none."""
    refuse_unserved(engine, GUIDED_DECODING, param)
    if engine in BY_LLGUIDANCE and (fault := fault_of(guided)) is not None:
        raise InvalidRequest(f"{param}: no answer can follow it: {fault}", param=param)


def _lark(grammar: str) -> str:
    """A grammar in whichever of the two ways it is written."""
    if is_ebnf(grammar):
        return lark_of(grammar)
    if not _LARK.search(grammar):
        raise ValueError(
            "it is neither Lark (rules `name: ...`, one of them `start`) nor EBNF (rules `name ::= ...`, one of them `root`)"
        )
    return grammar


def _grammar_of_schema(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=OURS)
    except ValueError as error:
        raise ValueError(f"the schema is no JSON: {error}") from error


def shortened(fault: str) -> str:
    """What llguidance says, without the state of its parser, in one line that fits into an error."""
    return " ".join(fault.partition("\n<state>")[0].split())[:LONGEST_FAULT]
