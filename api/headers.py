"""Request headers that say how a request is to be treated. What a header cannot mean is a 400 that names it."""

from __future__ import annotations

import dataclasses
import math

from starlette.datastructures import Headers

from pipeline.errors import InvalidRequest

RESUMABLE = "X-Baton-Resumable"
LINGER = "X-Baton-Linger"
TIMEOUT = "X-Request-Timeout"
READ_TIMEOUT = (
    "x-stainless-read-timeout"  # of OpenAI's and Anthropic's Python clients: how long they wait for the next byte
)
IDEMPOTENCY_KEY = "Idempotency-Key"

LONGEST_LINGER_S = 3600.0
LONGEST_KEY = 255
KEYED_LINGER_S = (
    2.0  # a client that sends again under its key may be quicker than the news that its first connection is gone
)


@dataclasses.dataclass(frozen=True, slots=True)
class Treatment:
    """`timeout_s` None: what the settings say. `idempotency_key` is empty where none was given. `linger_s`: how long the request goes
    on without a reader; None: to its end, as a resumable one does unless a time is given."""

    resumable: bool = False
    linger_s: float | None = 0.0
    timeout_s: float | None = None
    idempotency_key: str = ""


def treatment(headers: Headers, *, streams: bool = False) -> Treatment:
    """What the headers ask for. `streams`: the answer is a stream. Raises InvalidRequest.

    A client that waits so long for the next byte and no longer gives a whole answer its deadline, if nobody can fetch the answer after
    it has gone. In a stream each event and each ping is a byte, so there it says nothing of the end.
    """
    resumable, key = _flag(headers, RESUMABLE), _key(headers)
    linger_s = _seconds(headers, LINGER, most=LONGEST_LINGER_S)
    if linger_s is None and not resumable:
        linger_s = KEYED_LINGER_S if key else 0.0
    timeout_s = _timeout_s(headers)
    if timeout_s is None and not streams and linger_s == 0:
        timeout_s = _patience_s(headers)
    return Treatment(
        resumable=resumable,
        linger_s=linger_s,
        timeout_s=timeout_s,
        idempotency_key=key,
    )


def _flag(headers: Headers, name: str) -> bool:
    value = headers.get(name, "false").strip().lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name}: expected true or false, not {value[:100]!r}", param=name)
    return value == "true"


def _timeout_s(headers: Headers) -> float | None:
    seconds = _seconds(headers, TIMEOUT)
    if seconds == 0:
        raise InvalidRequest(f"{TIMEOUT}: expected more than 0 seconds", param=TIMEOUT)
    return seconds


def _patience_s(headers: Headers) -> float | None:
    """The client's own header, not one of its user's: what is no time in it (`None`, `0`) is not its user's mistake."""
    try:
        seconds = float(headers.get(READ_TIMEOUT, ""))
    except ValueError:
        return None
    return seconds if seconds > 0 and math.isfinite(seconds) else None


def _seconds(headers: Headers, name: str, *, most: float = math.inf) -> float | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (0 <= seconds <= most and math.isfinite(seconds)):
        limit = f" from 0 to {most:g}" if math.isfinite(most) else ""
        raise InvalidRequest(f"{name}: expected a number of seconds{limit}, not {value[:100]!r}", param=name)
    return seconds


def _key(headers: Headers) -> str:
    value = headers.get(IDEMPOTENCY_KEY)
    if value is None:
        return ""
    if not (0 < len(value) <= LONGEST_KEY and value.isascii() and value.isprintable()):
        raise InvalidRequest(
            f"{IDEMPOTENCY_KEY}: expected 1 to {LONGEST_KEY} printable ASCII characters", param=IDEMPOTENCY_KEY
        )
    return value
