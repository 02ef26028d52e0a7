"""The training text of `baton-tiny`: conversations and plain texts, all of them made here from a seed.

Nothing is read from outside. The same seed gives the same text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, TypedDict

from workers.training import documents, skills
from workers.training.documents import Filler
from workers.training.phrases import phrases
from workers.training.sentences import plain_sentence
from workers.training.stories import story

Size = Literal["short", "medium", "long", "longer", "longest"]
SIZES: dict[Size, int] = {"short": 96, "medium": 320, "long": 1088, "longer": 2048, "longest": 4096}

BOS, END = "<|bos|>", "<|end|>"

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are baton-tiny.",
    "You are baton-tiny, a small and friendly model.",
    "Answer briefly.",
    "You answer questions about Baton.",
    "Be polite and short.",
    "You are a friendly assistant. Answer in English.",
)


class Message(TypedDict):
    role: str
    content: str


class Sample(NamedTuple):
    """Either a conversation or a plain text (`messages` empty)."""

    kind: str
    messages: tuple[Message, ...]
    text: str = ""


class Segment(NamedTuple):
    """A piece of a sample between two special tokens. `answer` says that the model has to produce it."""

    text: str
    answer: bool


class ChatTokenizer(Protocol):
    """What `copy_prompts` needs of a Hugging Face tokenizer."""

    def apply_chat_template(
        self, conversation: list[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Corpus:
    """An endless source of samples. Two sources with different seeds share no document."""

    def __init__(self, seed: int, filler_sentences: int = 20_000) -> None:
        self._rng = random.Random(seed)
        self._filler = Filler(self._rng, filler_sentences)

    def sample(self, size: Size) -> Sample:
        """A sample that mostly has at most `SIZES[size]` tokens, and more than the next smaller size where its kind allows."""
        if size == "short":
            return self._short()
        if size == "medium":
            return self._medium()
        return self._long(SIZES[size] // 2, SIZES[size])

    def samples(self, size: Size, count: int) -> Iterator[Sample]:
        return (self.sample(size) for _ in range(count))

    def _short(self) -> Sample:
        rng = self._rng
        kind = rng.random()
        if kind < 0.25:
            return self._copy(rng.randint(20, 60))
        if kind < 0.29:
            return _text(
                rng,
                rng.choice(
                    [*(term.answer for term in phrases().terms), *(question.answer for question in phrases().questions)]
                ),
            )
        if kind < 0.36:
            return _conversation(rng, "recall", skills.name_recall(rng))
        name, exchange = skills.any_skill(rng)
        return _conversation(rng, name, [exchange])

    def _medium(self) -> Sample:
        rng = self._rng
        kind = rng.random()
        if kind < 0.35:
            return self._copy(rng.randint(60, 270))
        if kind < 0.5:
            name, exchange = "story", skills.tell_story(rng)
            return _conversation(rng, name, [exchange])
        if kind < 0.58:
            return _text(rng, story(rng, long=rng.random() < 0.6))
        if kind < 0.63:
            return _text(rng, self._text(rng.randint(60, 300)))
        return _conversation(rng, "several turns", self._turns(rng.randint(2, 5)))

    def _long(self, low: int, high: int) -> Sample:
        rng = self._rng
        kind = rng.random()
        if kind < 0.7:
            return self._copy(rng.randint(low // 2 if rng.random() < 0.3 else low, high - 110))
        if kind < 0.85:
            found = documents.document(rng, self._filler, rng.randint(low // 2, high - 320))
            asked = skills.Exchange(rng.choice(documents.QUESTIONS), found.secret)
            read = skills.Exchange(f"{rng.choice(documents.READ)}\n\n{found.text}", documents.ACKNOWLEDGED)
            return _conversation(rng, "copy later", [read, *self._turns(rng.randint(0, 2)), asked])
        if kind < 0.9:
            return _text(rng, self._text(rng.randint(low, high - 100)))
        return _conversation(rng, "many turns", self._turns(high // 80))

    def _copy(self, tokens: int) -> Sample:
        found = documents.document(self._rng, self._filler, tokens)
        exchange = skills.Exchange(documents.as_question(self._rng, found), found.secret)
        return _conversation(self._rng, "copy", [exchange])

    def _text(self, tokens: int) -> str:
        return " ".join(self._filler.sentences(self._rng, tokens))

    def _turns(self, count: int) -> list[skills.Exchange]:
        rng = self._rng
        turns: list[skills.Exchange] = []
        told: skills.Exchange | None = None
        while len(turns) < count:
            kind = rng.random()
            if kind < 0.1 and turns:
                turns.append(skills.Exchange(rng.choice(phrases().forms["say_again"]), turns[-1].answer))
            elif kind < 0.2 and told is None:
                told, *asked = skills.name_recall(rng)
                turns.append(told)
                turns.extend(skills.any_skill(rng)[1] for _ in range(rng.randint(0, 2)))
                turns.extend(asked)
            else:
                turns.append(skills.any_skill(rng)[1])
        return turns


def segments(sample: Sample) -> list[Segment]:
    """The sample as the chat template writes it, cut before each special token that opens a message.

    The pieces joined are what `apply_chat_template` gives for the same messages; tokenizing piece by piece gives the same ids.
    """
    if not sample.messages:
        start = [] if sample.kind == "middle of a text" else [Segment(BOS, False)]
        return [*start, Segment(sample.text + END, True)]
    pieces = [Segment(BOS, False)]
    for message in sample.messages:
        pieces.append(Segment(f"<|{message['role']}|>", False))
        pieces.append(Segment(message["content"].strip() + END, message["role"] == "assistant"))
    return pieces


def copy_prompts(count: int, tokens: int, seed: int, tokenizer: ChatTokenizer) -> list[tuple[list[Message], str]]:
    """Prompts that hide a secret sentence in plain sentences and ask for it: `(messages, expected answer)`.

    Each prompt, as the chat template writes it with the generation prompt, has at most `tokens` tokens and at most 24 fewer.
    Training draws its seeds from below 2**32; seeds from there on (`HELD_OUT_SEED`) give documents that training has not seen.
    Raises ValueError when `tokens` has no room for a document with its question (below 80).
    """
    if tokens < 80:
        raise ValueError(f"a copy prompt needs room for at least 80 tokens, not {tokens}")
    rng = random.Random(seed)
    return [_copy_prompt(rng, tokens, tokenizer) for _ in range(count)]


HELD_OUT_SEED = 2**32


def _copy_prompt(rng: random.Random, tokens: int, tokenizer: ChatTokenizer) -> tuple[list[Message], str]:
    secret = _patternless_secret(rng)
    marked = f'The secret sentence is: "{secret}"'
    sentences: list[str] = []
    used = _prompt_tokens([marked], tokenizer)
    while used + 24 < tokens:
        sentence = plain_sentence(rng)
        length = len(tokenizer.encode(" " + sentence, add_special_tokens=False))
        if used + length <= tokens:
            sentences.append(sentence)
            used += length
    at = rng.randint(0, len(sentences))
    messages = _ask([*sentences[:at], marked, *sentences[at:]])
    return messages, secret


def _patternless_secret(rng: random.Random) -> str:
    while (secret := documents.secret_sentence(rng)).endswith("."):
        pass
    return secret


def _ask(sentences: list[str]) -> list[Message]:
    text = " ".join(sentences)
    return [{"role": "user", "content": f"Read the following text.\n\n{text}\n\nRepeat the secret sentence."}]


def _prompt_tokens(sentences: list[str], tokenizer: ChatTokenizer) -> int:
    prompt = tokenizer.apply_chat_template(_ask(sentences), tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(prompt, add_special_tokens=False))


def _text(rng: random.Random, text: str) -> Sample:
    """A plain text, now and then one that begins in the middle of a sentence and without the start token."""
    words = text.split(" ")
    if len(words) > 20 and rng.random() < 0.25:
        return Sample("middle of a text", (), " ".join(words[rng.randrange(10) :]))
    return Sample("text", (), text)


def _conversation(rng: random.Random, kind: str, exchanges: list[skills.Exchange]) -> Sample:
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM_MESSAGES)})
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return Sample(kind, tuple(messages))
