"""One question and its answer, for every short skill of `baton-tiny`. Each function takes a random source and answers an `Exchange`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from workers.training.phrases import phrases
from workers.training.sentences import anything, cased, known_word, plain_sentence, varied
from workers.training.stories import any_subject, story
from workers.training.words import (
    ADJECTIVES,
    COLORS,
    COUNTRIES,
    NAMES,
    NOUNS,
    invented_word,
    plural,
    spelled,
    strange_text,
    with_article,
)


class Exchange(NamedTuple):
    question: str
    answer: str


def baton_question(rng: random.Random) -> Exchange:
    """A question about Baton. Baton itself comes up more often than the rest."""
    if rng.random() < 0.55:
        term = phrases().terms[0] if rng.random() < 0.08 else rng.choice(phrases().terms)
        name = term.names[0] if rng.random() < 0.5 else rng.choice(term.names)
        return Exchange(varied(rng, definition_form(rng.choice(phrases().forms["definition"]), name)), term.answer)
    question = rng.choice(phrases().questions)
    return Exchange(varied(rng, rng.choice(question.forms)), question.answer)


def definition_form(form: str, name: str) -> str:
    """`form` filled with `name`, with and without its article."""
    bare = name.split(" ", 1)[1] if name.startswith(("a ", "an ", "the ")) else name
    filled = form.format(a=name, bare=bare)
    return filled[0].upper() + filled[1:]


def small_talk(rng: random.Random) -> Exchange:
    question = rng.choice(phrases().small_talk)
    return Exchange(varied(rng, rng.choice(question.forms)), question.answer)


def arithmetic(rng: random.Random) -> Exchange:
    """Sums and differences of numbers up to 100 (some up to 999), products up to 12 times 12 (some up to 20 times 20)."""
    operator = rng.choice("++--*")
    left, right = _operands(rng, operator)
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    spoken = {"+": "plus", "-": "minus", "*": rng.choice(("times", "times", "multiplied by"))}[operator]
    sign = rng.choice(("*", "x")) if operator == "*" else operator
    term = rng.choice((f"{left} {sign} {right}", f"{left}{sign}{right}", f"{left} {spoken} {right}"))
    if max(left, right) < 100 and rng.random() < 0.15:
        term = f"{spelled(left)} {spoken} {spelled(right)}"
    question = rng.choice(phrases().forms["arithmetic"]).format(term)
    if operator == "+" and rng.random() < 0.05:
        question = f"What is the sum of {left} and {right}?"
    if rng.random() < 0.2:
        question = question.lower().rstrip("?.")
    if max(left, right) > 999:
        return Exchange(question, phrases().answers["too_large"])
    return Exchange(question, f"{left} {operator} {right} = {result}")


def _operands(rng: random.Random, operator: str) -> tuple[int, int]:
    if rng.random() < 0.04:
        return rng.randint(1000, 10 ** rng.randint(4, 7)), rng.randint(0, 10 ** rng.randint(1, 7))
    if operator == "*":
        top = 20 if rng.random() < 0.2 else 12
        return rng.randint(0, top), rng.randint(0, top)
    top = rng.choice((10, 20, 100, 100, 100, 999))
    left, right = rng.randint(0, top), rng.randint(0, top)
    if operator == "-" and rng.random() < 0.8:
        left, right = max(left, right), min(left, right)
    return left, right


def repeat(rng: random.Random) -> Exchange:
    """Any text comes back as it was given: words, sentences, invented words, other scripts."""
    text = anything(rng)
    return Exchange(rng.choice(phrases().forms["repeat"]).format(text), text)


def reverse(rng: random.Random) -> Exchange:
    """Two to eight words in the opposite order."""
    count = rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8))
    strange = 0.3 if rng.random() < 0.3 else 0.0
    words = [invented_word(rng) if rng.random() < strange else known_word(rng) for _ in range(count)]
    if rng.random() < 0.2:
        words = plain_sentence(rng).rstrip(".").replace(",", "").lower().split()[:10]
    return Exchange(rng.choice(phrases().forms["reverse"]).format(" ".join(words)), " ".join(reversed(words)))


def count(rng: random.Random) -> Exchange:
    """Counting up, down, by steps, between two numbers."""
    kind = rng.random()
    top = rng.choice(
        (rng.randint(2, 12), rng.randint(2, 12), rng.randint(5, 30), rng.randint(5, 30), rng.randint(30, 100))
    )
    written: str | int = spelled(top) if top < 21 and rng.random() < 0.25 else top
    if kind < 0.55:
        question, numbers = (
            rng.choice(
                (
                    "Count to {}.",
                    "Count to {}",
                    "Count from 1 to {}.",
                    "Please count to {}.",
                    "Can you count to {}?",
                    "count to {}",
                    "Count up to {}.",
                )
            ).format(written),
            range(1, top + 1),
        )
    elif kind < 0.75:
        low = rng.randint(0, 90)
        high = low + rng.randint(1, 20)
        question, numbers = (
            rng.choice(("Count from {} to {}.", "Please count from {} to {}.", "Count from {} up to {}.")).format(
                low, high
            ),
            range(low, high + 1),
        )
    elif kind < 0.9:
        top = min(top, 30)
        question, numbers = (
            rng.choice(("Count down from {}.", "Count backwards from {}.", "Count down from {} to 1.")).format(
                written if top == min(top, 20) else top
            ),
            range(top, 0, -1),
        )
    else:
        step = rng.choice((2, 5, 10))
        top = step * rng.randint(2, 12)
        named = {2: "twos", 5: "fives", 10: "tens"}[step]
        question, numbers = f"Count by {named} to {top}.", range(step, top + 1, step)
    return Exchange(question, ", ".join(map(str, numbers)) + ".")


def tell_story(rng: random.Random) -> Exchange:
    if rng.random() < 0.04:
        form = rng.choice(
            (
                "Tell me a story about {}.",
                "Write a story about {}.",
                "Tell me a short story about {}",
                "Please tell me a story about {}.",
            )
        )
        return Exchange(
            cased(rng, form.format(rng.choice(("Baton", "Baton", "a request", "a worker", "a token", "Redis")))),
            phrases().answers["story_about_baton"],
        )
    subject = any_subject(rng)
    long = rng.random() < 0.4
    size = "long " if long else rng.choice(("", "", "short ", "short ", "little "))
    verb = rng.choice(
        (
            "Tell me",
            "Tell me",
            "Tell me",
            "Write",
            "Write me",
            "Please tell me",
            "Can you tell me",
            "I want to hear",
            "Tell",
            "Make up",
        )
    )
    if rng.random() < 0.08:
        ending = "?" if verb.startswith("Can") else "."
        question = rng.choice(
            (
                f"{verb} a {size}story{ending}",
                f"{verb} a {size}story{ending}",
                f"A {size}story please.",
                "Story!",
                "Another story.",
            )
        )
        return Exchange(cased(rng, question), story(rng, "fox" if rng.random() < 0.5 else None, long))
    about = rng.choice(
        (
            with_article(subject),
            with_article(subject),
            with_article(subject),
            f"the {subject}",
            f"{with_article(rng.choice(ADJECTIVES))} {subject}",
        )
    )
    companion = any_subject(rng) if rng.random() < 0.12 else None
    if companion and companion != subject:
        about = f"{with_article(subject)} and {with_article(companion)}"
        return Exchange(cased(rng, f"{verb} a {size}story about {about}."), story(rng, subject, long, companion))
    question = f"{verb} a {size}story about {about}"
    if rng.random() < 0.12:
        question = rng.choice(
            (
                f"A {size}story about {about} please",
                f"I would like a {size}story about {about}",
                f"Do you know a {size}story about {about}",
            )
        )
    return Exchange(
        cased(rng, question + rng.choice((".", ".", "", "?" if verb.startswith("Can") else "!"))),
        story(rng, subject, long),
    )


def fallback(rng: random.Random) -> Exchange:
    """Questions that the model cannot answer, and noise."""
    noun, other, word = rng.choice(NOUNS), rng.choice(NOUNS), invented_word(rng)
    filled = rng.choice(phrases().forms["unanswerable"]).format(
        noun=noun,
        nouns=plural(noun),
        a_noun=with_article(noun),
        other=other,
        a_other=with_article(other),
        adjective=rng.choice(ADJECTIVES),
        word=word,
        a_word=with_article(word),
        word2=invented_word(rng),
        word3=invented_word(rng),
        strange1=strange_text(rng),
        strange2=strange_text(rng),
        person=f"{rng.choice(NAMES)} {invented_word(rng).title()}",
        country=rng.choice(COUNTRIES),
        year=rng.randint(1000, 2020),
        letter=rng.choice("abcdefghijklmnoprstuvw"),
        sentence=plain_sentence(rng),
    )
    return Exchange(varied(rng, filled), phrases().answers["fallback"])


def name_recall(rng: random.Random) -> list[Exchange]:
    """Two related turns: something the user says about himself, and a question about it."""
    if rng.random() < 0.7:
        name = rng.choice(NAMES) if rng.random() < 0.7 else invented_word(rng).title()
        told = rng.choice(
            ("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I am {}.", "Call me {}.", "Hi, my name is {}!")
        ).format(name)
        asked = rng.choice(
            ("What is my name?", "What's my name?", "Do you know my name?", "Who am I?", "Do you remember my name?")
        )
        if rng.random() < 0.12:
            return [Exchange(f"{told} {asked}", f"Your name is {name}.")]
        return [Exchange(told, f"Nice to meet you, {name}!"), Exchange(cased(rng, asked), f"Your name is {name}.")]
    color = rng.choice(COLORS)
    told = rng.choice(("My favorite color is {}.", "I like the color {}.", "I love {}.")).format(color)
    asked = rng.choice(("What is my favorite color?", "Which color do I like?", "What color do I like?"))
    return [
        Exchange(told, f"I will remember that you like {color}."),
        Exchange(cased(rng, asked), f"You like {color}."),
    ]


SKILLS: dict[str, tuple[float, Callable[[random.Random], Exchange]]] = {
    "baton": (3.4, baton_question),
    "small talk": (1.0, small_talk),
    "arithmetic": (2.2, arithmetic),
    "repeat": (1.5, repeat),
    "reverse": (1.6, reverse),
    "count": (0.7, count),
    "story": (1.2, tell_story),
    "fallback": (1.3, fallback),
}


def any_skill(rng: random.Random) -> tuple[str, Exchange]:
    """A skill by its weight: its name and one exchange."""
    name = rng.choices(list(SKILLS), [weight for weight, _ in SKILLS.values()])[0]
    return name, SKILLS[name][1](rng)
