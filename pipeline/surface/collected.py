"""Tokens of a request in, what its choices say out: all that has come so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pipeline.answer_form import AnswerForm, form_of
from pipeline.parsing import Part, PartKind
from pipeline.protocol import Request
from pipeline.stream import TokenChunk
from pipeline.surface.feed import Choices
from pipeline.surface.logprobs import Logprobs
from pipeline.surface.said import Said
from pipeline.tokenizer import NoTokenizer, Tokenizer


class Collected:
    """What the choices of a request say."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request) -> None:
        self.choices = Choices(tokenizer, request, by_token=False)
        self._logprobs = Logprobs(tokenizer, request)
        self._form = form_of(request)
        self._echoed = len(request.input.token_ids) if self._form.echoes and not self._form.hides_logprobs else 0
        self._said: list[Said] = [Said() for _ in self.choices.reasons]

    def push(self, chunks: Sequence[TokenChunk]) -> None:
        """More tokens."""
        for chunk in chunks:
            self._logprobs.push(chunk)
        for piece in self.choices.push(chunks):
            said = self._said[piece.choice]
            for part in [Part(PartKind.CONTENT, piece.text)] if piece.parts is None else piece.parts:
                said.add(part)
            said.token_ids += piece.token_ids
        for choice, said in enumerate(self._said):
            said.finish, said.stop_string = self.choices.finish_word(choice), self.choices.stop_string(choice)

    def all(self) -> list[Said]:
        """Everything, with the log probabilities of what has come since the last call."""
        prompt = self._logprobs.prompt()
        for choice, said in enumerate(self._said):
            said.logprobs, said.prompt_logprobs = self._logprobs.take(choice), prompt
        return kept(self._said, self._form, self._echoed)


def kept(said: list[Said], form: AnswerForm, echoed: int = 0) -> list[Said]:
    """Those that are told: all, or the likeliest by their mean log probability, best first. `echoed`: tokens of the prompt before them."""
    if not form.keeps:
        return said
    best = sorted(said, key=lambda one: _mean_logprob(one, echoed), reverse=True)[: form.keeps]
    return [dataclasses.replace(one, logprobs=None) for one in best] if form.hides_logprobs else best


def _mean_logprob(said: Said, echoed: int) -> float:
    known = [one for one in (said.logprobs or {}).get("token_logprobs", ())[echoed:] if one is not None]
    return sum(known) / len(known) if known else -math.inf
