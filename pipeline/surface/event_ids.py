"""The id of an event says how far each choice has been sent, so that any replica can go on exactly there.

    id     = choice *("." choice) ["-u"]   one for each choice, in order; -u: the usage event has been sent
    choice = "o"                           its opening event has not been sent (chat only)
           | tokens                        the text that is certain after so many tokens has been sent
           | tokens "t"                    all of its text has been sent, its finish event has not
           | tokens "e"                    its finish event has been sent
    tokens = "0" | a number without a zero in front

The text after k tokens is a function of these k tokens alone, so nothing else is needed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import InvalidRequest
from pipeline.protocol import Log, Request
from pipeline.surface.said import FINISH_WORDS
from pipeline.surface.shapes.openai import is_chat

UNOPENED, CERTAIN, COMPLETE, FINISHED = "o", "", "t", "e"
LAST_EVENT_ID = "Last-Event-ID"

_ID = re.compile(r"(?P<marks>[0-9teo.]+)(?P<usage>-u)?")
_MARK = re.compile(r"(?P<tokens>0|[1-9][0-9]{0,8})(?P<phase>[te]?)")


class Mark(NamedTuple):
    """How far one choice has been sent."""

    tokens: int
    phase: str

    def __str__(self) -> str:
        return UNOPENED if self.phase == UNOPENED else f"{self.tokens}{self.phase}"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """How far a stream has been sent."""

    marks: Sequence[Mark]
    has_usage: bool = False

    @classmethod
    def at_start(cls, request: Request) -> Place:
        """Nothing has been sent."""
        first = Mark(0, UNOPENED if is_chat(request) else CERTAIN)
        return cls([first] * request.input.sampling_options.n)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each choice that a reader at this place has."""
        return [mark.tokens for mark in self.marks]


def read_event_id(text: str, request: Request, log: Log) -> Place:
    """The place that an id names in a stream of `request`. Raises InvalidRequest that says what is wrong with it."""
    whole = _ID.fullmatch(text)
    if whole is None:
        raise _wrong(text, "it is not an id of Baton's events")
    parts = whole["marks"].split(".")
    if len(parts) != len(log.tokens):
        raise _wrong(text, f"it has {len(parts)} part(s) and the request {len(log.tokens)} choice(s)")
    place = Place([_read_mark(text, part, request) for part in parts], whole["usage"] is not None)
    _check_opening(text, place)
    for choice, mark in enumerate(place.marks):
        _check_log(text, choice, mark, log)
    if place.has_usage and not (request.include_usage and all(mark.phase == FINISHED for mark in place.marks)):
        raise _wrong(text, "no usage was sent there")
    return place


def _read_mark(text: str, part: str, request: Request) -> Mark:
    if part == UNOPENED and is_chat(request):
        return Mark(0, UNOPENED)
    found = _MARK.fullmatch(part)
    if found is None:
        raise _wrong(text, f"{part[:20]!r} is not how far a choice of a {request.kind} can be")
    return Mark(int(found["tokens"]), found["phase"])


def _check_opening(text: str, place: Place) -> None:
    """Choices are opened in order and before any text."""
    phases = [mark.phase for mark in place.marks]
    if UNOPENED in phases:
        opened = phases.index(UNOPENED)
        if any(mark != Mark(0, CERTAIN) for mark in place.marks[:opened]) or set(phases[opened:]) != {UNOPENED}:
            raise _wrong(text, "all choices are opened, in order, before any text is sent")


def _check_log(text: str, choice: int, mark: Mark, log: Log) -> None:
    count, reason = len(log.tokens[choice]), log.finished[choice]
    if mark.tokens > count:
        raise _wrong(text, f"it is ahead of the log: choice {choice} has {count} tokens")
    if mark.phase in (COMPLETE, FINISHED) and (mark.tokens != count or reason is None):
        raise _wrong(text, f"choice {choice} did not end there")
    if mark.phase == FINISHED and reason not in FINISH_WORDS:
        raise _wrong(text, f"choice {choice} came to no end that is told")


def _wrong(text: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{LAST_EVENT_ID} {text[:100]!r}: {why}", param=LAST_EVENT_ID)
