"""Grammars in EBNF say the same in Lark: llguidance takes the texts that they allow, and no others."""

from __future__ import annotations

import functools
import re

import pytest
from llguidance import LLMatcher, LLTokenizer

from pipeline.builtin import BUILTIN_MODEL
from pipeline.ebnf import MOST_CHARS
from pipeline.grammars import fault_of, grammar_of
from pipeline.protocol import GuidedDecoding
from pipeline.tokenizer import Tokenizer

SUM = """
# sums, over several lines
root ::= term | # one alone
         term "+" root
term ::= [0-9]+
  # a remark | with a bar
  | "(" root ")"
"""


@functools.cache
def tokenizers() -> tuple[Tokenizer, LLTokenizer]:
    own = Tokenizer.load(BUILTIN_MODEL)
    return own, LLTokenizer(own.as_json(), n_vocab=own.known_tokens, eos_token=own.eos_token_ids)


def allows(grammar: str, text: str) -> bool:
    own, theirs = tokenizers()
    matcher = LLMatcher(theirs, grammar_of(GuidedDecoding(grammar=grammar)), log_level=0)
    tokens = own.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('root ::= "a" | "b"', ["a", "b"], ["", "ab", "c"]),
        (SUM, ["1", "12+3", "(1+(2))+3"], ["+", "1+", "(1", "a remark"]),
        ('root ::= "<" word{2,3} ">"\nword ::= [a-c] "."', ["<a.b.>", "<a.b.c.>"], ["<a.>", "<a.d.>"]),
        ('root ::= ("x"\n | "y")? [^#"|]+ "#"', ["xz#", "zz#"], ["#", 'x"#', "z|#"]),
        (r'root ::= "\u00e9\x22\"" [\u0061-\x63\-&\]]', ['é""b', 'é""-', 'é""&', 'é""]'], ['é""d', "é", 'u00e9""b']),
        (r'root ::= "\U0001F600\n"', ["😀\n"], ["😀", "1F600\n"]),
        ("root ::= camelCase kebab-case\ncamelCase ::= [A-Z]\nkebab-case ::= [0-9]", ["A1"], ["1A"]),
    ],
)
def test_the_same_texts_are_allowed(grammar: str, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not allows(grammar, text)] == []
    assert [text for text in wrong if allows(grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("root = nonsense", "neither Lark .* nor EBNF"),
        ("Tell me a story.", "neither Lark .* nor EBNF"),
        ('answer: "a"', "neither Lark .* nor EBNF"),
        ("root ::= missing", "as EBNF: Rule 'missing' not found"),
        ('answer ::= "a"', "as EBNF: No 'root' rule"),
        ('root ::= "a', "as EBNF: Unexpected end"),
        ('root ::= "a\\', "as EBNF: "),
        ("root ::= [z-a]", "invalid regex"),
        (r'root ::= "\ud800"', "."),
        (r'root ::= "\UFFFFFFFF"', "as EBNF: "),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deeply"),
        ('root ::= "' + "a" * MOST_CHARS + '"', f"{MOST_CHARS} at most"),
    ],
)
def test_what_cannot_be_read_is_told(grammar: str, why: str) -> None:
    fault = fault_of(GuidedDecoding(grammar=grammar))
    assert fault is not None
    assert re.search(why, fault), fault
    fault.encode()  # it can be told


@pytest.mark.parametrize(
    "grammar", ['start: "a"', '?start: "a" | "::="', '%llguidance {}\nstart: "a"', 'x: "a"\nstart : x']
)
def test_lark_stays_as_it_is(grammar: str) -> None:
    assert fault_of(GuidedDecoding(grammar=grammar)) is None
    assert allows(grammar, "a")
