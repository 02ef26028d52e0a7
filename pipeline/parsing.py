"""What the text of an answer consists of: content, reasoning, calls of functions.

The parts after k tokens are a function of these k tokens alone, as the text is, so any replica can go on in the middle of an answer.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol


class PartKind(enum.Enum):
    """What a piece of text is. A `CALL` has the function's name as text and opens the call; its `ARGUMENTS` follow, as JSON."""

    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    ARGUMENTS = "arguments"


class Part(NamedTuple):
    """A piece of an answer. `call`: the place of its call among those of the answer, from 0; without meaning for text."""

    kind: PartKind
    text: str
    call: int = 0


class Parser(Protocol):
    """Reads one choice: push its text as it becomes certain, then finish. Nothing that was given out is taken back. `is_torn`: a call was
    given out whose arguments are not over."""

    @property
    def is_torn(self) -> bool: ...

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...
