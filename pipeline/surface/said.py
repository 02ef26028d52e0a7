"""What the choices of an answer say, collected: for whole answers, and for the objects that streams end with."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from pipeline.parsing import Part, PartKind
from pipeline.protocol import FinishReason, Request


@dataclasses.dataclass(slots=True)
class Call:
    """One call of a function; `arguments` is JSON, torn where the answer ended too early."""

    name: str
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class Block:
    """Neighbouring pieces of one kind; of a call (kind `CALL`, the place `call`) the arguments are in `Said.calls`."""

    kind: PartKind
    pieces: list[str]
    call: int = 0


@dataclasses.dataclass(slots=True)
class Said:
    """One choice so far. `blocks`: all of it in the order in which it was said. `finish`: OpenAI's word for its end, None while it goes
    on; `stop_string`: the one that ended it, if one did."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None
    stop_string: str | None = None
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None

    def add(self, part: Part) -> None:
        """One more piece."""
        match part.kind:
            case PartKind.CONTENT:
                self.content += part.text
                self._join(part)
            case PartKind.REASONING:
                self.reasoning += part.text
                self._join(part)
            case PartKind.CALL:
                self.calls.append(Call(part.text))
                self.blocks.append(Block(part.kind, [part.text], part.call))
            case PartKind.ARGUMENTS:
                self.calls[part.call].arguments += part.text

    def _join(self, part: Part) -> None:
        if not part.text:
            return
        if not self.blocks or self.blocks[-1].kind is not part.kind:
            self.blocks.append(Block(part.kind, []))
        self.blocks[-1].pieces.append(part.text)


def call_id(request: Request, choice: int, call: int, prefix: str = "call") -> str:
    """The same for every reader of the request."""
    digest = hashlib.blake2b(f"{request.id}\0{choice}\0{call}".encode(), digest_size=12)
    return f"{prefix}_{digest.hexdigest()}"


FINISH_WORDS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def finish_word(reason: FinishReason, *, has_calls: bool) -> str:
    """OpenAI's word for an end."""
    word = FINISH_WORDS[reason]
    return "tool_calls" if has_calls and word == "stop" else word


def is_parsed(request: Request) -> bool:
    """Whether the answer is a message, which may hold reasoning and calls; else it is text."""
    return request.kind not in ("text_completion", "task")
