"""What an answer must know of its request beyond the tokens, for every replica that shows it; workers carry it unread.

It travels as one annotation of the engine's input, so that workers of an older release serve requests with fields that they do not know.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from pipeline.protocol import BackendInput, Request, Wire

ANNOTATION = "answer:"

AUTO, NONE, REQUIRED, NAMED = "auto", "none", "required", "named"


class AnswerForm(Wire, frozen=True, kw_only=True):
    """`tools` are functions as OpenAI's chats define them; empty where the answer may call none, one where `tool_choice` is `named`.
    `keeps`: so many of the choices are told, the likeliest; 0: all. `hides_logprobs`: they are known for that alone. `echoes`: the prompt
    stands in front of each text, and its log probabilities in front of the answer's. `prompt_logprobs`: they are told as a field, with so
    many of the likeliest. `body`: what the shape of this kind of answer repeats of the request's body."""

    service_tier: str = ""
    return_token_ids: bool = False
    continuous_usage: bool = False
    echoes: bool = False
    prompt_logprobs: int | None = None
    keeps: int = 0
    hides_logprobs: bool = False
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tool_choice: str = AUTO
    shows_reasoning: bool = True
    body: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def has_forced_call(self) -> bool:
        """Whether a grammar makes the answer a list of calls, or the arguments of one."""
        return bool(self.tools) and self.tool_choice in (REQUIRED, NAMED)


PLAIN = AnswerForm()

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AnswerForm).decode


def with_form(ready: BackendInput, form: AnswerForm) -> BackendInput:
    """The same input with the form of its answer."""
    if form == PLAIN:
        return ready
    return replace(ready, annotations=[*ready.annotations, ANNOTATION + _encode(form).decode()])


def form_of(request: Request) -> AnswerForm:
    """The form that a request was stored with."""
    for annotation in request.input.annotations:
        if annotation.startswith(ANNOTATION):
            return _decode(annotation.removeprefix(ANNOTATION))
    return PLAIN
