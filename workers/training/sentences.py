"""Words put together: plain sentences, anything that can be repeated, and text as people really type it."""

from __future__ import annotations

import random

from workers.training.phrases import phrases
from workers.training.words import (
    ADJECTIVES,
    ADVERBS,
    ANIMALS,
    COLORS,
    COMMON,
    NAMES,
    NOUNS,
    PEOPLE,
    PREPOSITIONS,
    THINGS,
    VERBS_PAST,
    invented_word,
    number,
    plural,
    strange_text,
)


def plain_sentence(rng: random.Random) -> str:
    """A grammatical sentence without much sense: the filler of long documents."""
    subject = f"{_the(rng)} {rng.choice(ADJECTIVES)} {rng.choice((*PEOPLE, *ANIMALS))}"
    obj = f"{_the(rng)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    place = f"{rng.choice(PREPOSITIONS)} the {rng.choice(NOUNS)}"
    verb, adverb = rng.choice(VERBS_PAST), rng.choice(ADVERBS)
    forms = (
        f"{subject} {verb} {obj} {place}.",
        f"{adverb} {subject} {verb} {obj}.",
        f"{subject} {adverb} {verb} {obj}.",
        f"in the {rng.choice(NOUNS)} {subject} {verb} {number(rng)} {plural(rng.choice(NOUNS))} {place}.",
        f"{subject} and {rng.choice(NAMES)} {verb} {obj} {adverb}.",
        f"{rng.choice(NAMES)} {verb} {obj} {place}, and {subject} {rng.choice(VERBS_PAST)} it.",
        f"there were {number(rng)} {plural(rng.choice(THINGS))} {place}.",
        f"{obj} {place} was {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}.",
    )
    sentence = rng.choice(forms)
    return sentence[0].upper() + sentence[1:]


def varied(rng: random.Random, text: str) -> str:
    """`text` as people really type it: other case, other punctuation, a polite word, sometimes a typing error."""
    kind = rng.random()
    if kind < 0.45:
        return text
    if kind < 0.6:
        return text.lower()
    if kind < 0.72:
        return text.rstrip("?.!")
    if kind < 0.82:
        return text.rstrip("?.!").lower()
    if kind < 0.86:
        return text.rstrip("?.!") + rng.choice(("??", "!", "...", " ?", "!?"))
    if kind < 0.93:
        return rng.choice(
            (
                "Hi, ",
                "Hello, ",
                "Hello! ",
                "Please, ",
                "Hey, ",
                "So, ",
                "Well, ",
                "Ok, ",
                "Excuse me, ",
                "Question: ",
                "Please tell me: ",
                "Tell me: ",
                "Can you tell me: ",
                "One more question: ",
                "I have a question: ",
                "My question is: ",
                "And ",
                "Also, ",
                "Now ",
                "Ok. ",
            )
        ) + _first_lower(text)
    if kind < 0.96:
        return text + rng.choice((" Thanks.", " Please.", " Thank you!"))
    return _with_typo(rng, text)


def cased(rng: random.Random, text: str) -> str:
    kind = rng.random()
    return text if kind < 0.75 else text.lower() if kind < 0.9 else text.lower().rstrip("?.!")


def _with_typo(rng: random.Random, text: str) -> str:
    if len(text) < 6:
        return text
    at = rng.randrange(1, len(text) - 2)
    if rng.random() < 0.5:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _first_lower(text: str) -> str:
    return text if text.startswith(("I ", "Baton", "Redis")) else text[0].lower() + text[1:]


def _the(rng: random.Random) -> str:
    return rng.choice(("the", "the", "the", "one", "every", "that"))


def known_word(rng: random.Random) -> str:
    return rng.choice(rng.choice((NOUNS, NOUNS, ADJECTIVES, VERBS_PAST, ADVERBS, ANIMALS, COLORS, COMMON, COMMON)))


def anything(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return plain_sentence(rng).rstrip("." if rng.random() < 0.5 else "")
    words = [known_word(rng) for _ in range(rng.randint(1, 12))]
    if kind < 0.5:
        return " ".join(words)
    if kind < 0.6:
        return " ".join(number(rng) if rng.random() < 0.4 else word for word in words)
    if kind < 0.75:
        return " ".join(invented_word(rng) if rng.random() < 0.6 else word for word in words)
    if kind < 0.82:
        return " ".join(rng.choice((word.title(), word.upper(), word)) for word in words)
    if kind < 0.88:
        return " ".join(strange_text(rng) for _ in range(rng.randint(1, 3)))
    if kind < 0.93:
        return "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(2, 20)))
    return rng.choice(rng.choice((*phrases().questions, *phrases().small_talk)).forms)
