"""What the model is taught to say, read from phrases.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Term(NamedTuple):
    """A thing with a definition. `names` are nouns with their article, or without for names and plurals."""

    names: tuple[str, ...]
    answer: str


class Question(NamedTuple):
    """One thing that people ask in many ways."""

    forms: tuple[str, ...]
    answer: str


class Phrases(NamedTuple):
    """`forms` are ways to ask for a skill; `held_out_questions` and `forms["held_out_definition"]` are kept out of training."""

    answers: dict[str, str]
    forms: dict[str, tuple[str, ...]]
    terms: tuple[Term, ...]
    questions: tuple[Question, ...]
    small_talk: tuple[Question, ...]
    held_out_questions: tuple[Question, ...]


@cache
def phrases() -> Phrases:
    read = tomllib.loads((Path(__file__).parent / "phrases.toml").read_text(encoding="utf-8"))
    return Phrases(
        answers=read["answers"],
        forms={name: tuple(forms) for name, forms in read["forms"].items()},
        terms=tuple(Term(tuple(term["names"]), term["answer"]) for term in read["terms"]),
        questions=_questions(read["questions"]),
        small_talk=_questions(read["small_talk"]),
        held_out_questions=_questions(read["held_out_questions"]),
    )


def _questions(read: list[dict[str, str]]) -> tuple[Question, ...]:
    return tuple(Question(tuple(question["forms"]), question["answer"]) for question in read)
