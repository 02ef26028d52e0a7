"""What a stage's handler says of a task: expected ends are values, exceptions are surprises (and become one of these)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import msgspec

from pipeline.errors import (
    DeadlineExceeded,
    EngineDied,
    EngineDown,
    RedisUnavailable,
    RetryLater,
    TimeLimitExceeded,
    TransferError,
    Unservable,
    WireError,
)
from pipeline.protocol import KVHandle, LLMEngineOutput


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """The request is complete: its tokens are in the log, and `result` (what msgpack carries; None: none) is kept with it."""

    result: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Handover:
    """Prefill is complete: the first outputs, and where the blocks are. `kv` None: every choice ended."""

    outputs: list[LLMEngineOutput]
    kv: KVHandle | None
    cached_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Retry:
    """The task waits again, ahead of new ones. A delivery without progress counts as an attempt when `counts`.

    `backs_off`: not at once, but later each time; `countdown`: after so many seconds. `is_suspect`: its engine died, perhaps of it,
    so it runs alone the next time.
    """

    why: str
    counts: bool = True
    backs_off: bool = False
    is_suspect: bool = False
    countdown: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Fail:
    """The request ends as failed: repeating it cannot help."""

    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """The task itself is bad: dead-lettered, which ends the request."""

    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """Not this delivery's any more (ended elsewhere, lease lost): nothing is left to say."""

    why: str


Outcome = Done | Handover | Retry | Fail | Reject | Dropped


class Answer(enum.Enum):
    """What Redis answered when an outcome was said to it."""

    TAKEN = enum.auto()
    DEAD = enum.auto()  # dead-lettered: it does not wait for another try
    NOT_OURS = enum.auto()  # it had ended, or is another delivery's: nothing was changed
    UNSAID = enum.auto()  # Redis was away until this worker had to leave


def classify(error: BaseException) -> Outcome:
    """The outcome of a handler that raised."""
    match error:
        case WireError():
            return Reject(str(error))
        case Unservable() | TimeLimitExceeded():
            return Fail(str(error))
        case RetryLater():
            return Retry(str(error), backs_off=error.countdown is None, countdown=error.countdown)
        case DeadlineExceeded():
            return Dropped(str(error))
        case EngineDown():
            return Retry(str(error), counts=False)
        case EngineDied():
            return Retry(str(error), is_suspect=True)
        case RedisUnavailable():
            return Retry(str(error))
        case TransferError():
            return Retry(str(error), backs_off=True)
        case _:
            return Retry(f"{type(error).__name__}: {error}", backs_off=True)


def packed(outcome: Outcome, max_bytes: int) -> Outcome:
    """The outcome with its result as it is stored; a result that cannot be stored fails the request."""
    if not isinstance(outcome, Done) or outcome.result is None:
        return outcome
    try:
        data = msgspec.msgpack.encode(outcome.result)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return Fail(f"its result cannot be stored: {error}")
    if len(data) > max_bytes:
        return Fail(f"its result has {len(data)} bytes, more than queue.max_result_bytes ({max_bytes})")
    return Done(data)
