"""Long documents with one secret sentence in them: the skill that shows whether the keys and values of a prompt arrived intact."""

from __future__ import annotations

import random
from typing import NamedTuple

from workers.training.sentences import plain_sentence
from workers.training.words import (
    ADJECTIVES,
    ADVERBS,
    NAMES,
    NOUNS,
    PREPOSITIONS,
    SECRET_WORDS,
    VERBS_PAST,
    number,
    plural,
)

MARKERS = (
    'The secret sentence is: "{}"',
    'The secret sentence is: "{}"',
    'The secret sentence is: "{}"',
    'Here is the secret sentence: "{}"',
    'Remember this secret sentence: "{}"',
    'This is the secret sentence: "{}"',
)
QUESTIONS = (
    "Repeat the secret sentence.",
    "Repeat the secret sentence.",
    "What is the secret sentence?",
    "What was the secret sentence?",
    "Which secret sentence is hidden in the text?",
    "Please repeat the secret sentence.",
    "Tell me the secret sentence.",
    "Find the secret sentence and repeat it.",
    "Say the secret sentence.",
)
READ = ("Read the following text.", "Read this text.", "Here is a text.", "Read this text carefully.")
ACKNOWLEDGED = "I have read the text."


class Document(NamedTuple):
    """`text` with the marked `secret` somewhere in it."""

    text: str
    secret: str


class Filler:
    """A stock of plain sentences with their approximate length in tokens."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self._sentences = [plain_sentence(rng) for _ in range(size)]
        self._tokens = [_approximate_tokens(sentence) for sentence in self._sentences]

    def sentences(self, rng: random.Random, tokens: int) -> list[str]:
        """Sentences of about `tokens` tokens together, not more; none when `tokens` is smaller than any."""
        chosen: list[str] = []
        while tokens >= 8:
            index = rng.randrange(len(self._sentences))
            tokens -= self._tokens[index]
            if tokens >= 0:
                chosen.append(self._sentences[index])
        return chosen


def secret_sentence(rng: random.Random) -> str:
    """Six to thirteen words that nobody could guess: without a pattern, or (less often) a sentence with grammar; with numbers."""
    if rng.random() < 0.25:
        return (
            f"{rng.choice(NAMES)} {rng.choice(VERBS_PAST)} {number(rng)} {rng.choice(ADJECTIVES)} {plural(rng.choice(NOUNS))} "
            f"{rng.choice(PREPOSITIONS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(ADVERBS)}."
        )
    words = rng.sample(SECRET_WORDS, rng.randint(5, 11))
    for _ in range(rng.randint(1, 2)):
        words.insert(rng.randint(1, len(words)), number(rng))
    return " ".join(words)


def document(rng: random.Random, filler: Filler, tokens: int) -> Document:
    """Plain sentences of about `tokens` tokens with a marked secret at a random place."""
    secret = secret_sentence(rng)
    marked = rng.choice(MARKERS).format(secret)
    sentences = filler.sentences(rng, tokens - _approximate_tokens(marked))
    if rng.random() < 0.15 and sentences:
        decoy = f'{rng.choice(NAMES)} said: "{secret_sentence(rng)}"'
        sentences.insert(rng.randint(0, len(sentences)), decoy)
    return Document(place_secret(rng, sentences, marked), secret)


def place_secret(rng: random.Random, sentences: list[str], marked: str) -> str:
    """One text of `sentences` with `marked` between two of them, or at either end."""
    at = rng.randint(0, len(sentences))
    return " ".join((*sentences[:at], marked, *sentences[at:]))


def as_question(rng: random.Random, found: Document) -> str:
    """The document and the question in one message; the question mostly stands at the end."""
    asked = rng.choice(QUESTIONS)
    kind = rng.random()
    if kind < 0.5:
        return f"{rng.choice(READ)}\n\n{found.text}\n\n{asked}"
    if kind < 0.75:
        return f"{found.text}\n\n{asked}"
    if kind < 0.88:
        return f"{found.text} {asked}"
    return f"Find the secret sentence in this text and repeat it.\n\n{found.text}"


def _approximate_tokens(sentence: str) -> int:
    """Words, and about one more for each sign and each digit."""
    return sum(1 + (len(word) - 1 if word.isdigit() else 0) for word in sentence.split()) + 2
