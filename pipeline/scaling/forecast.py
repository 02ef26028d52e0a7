"""How much will come when a worker that is started now is ready: arrivals of the last minutes, and what they say of the next.

Arrivals are counted, so chance alone moves a count n by about its square root (Poisson). What is within that is noise, and the mean of
the last minute holds; what is far outside is a jump and is believed at once; a difference between two minutes is a trend.
"""

from __future__ import annotations

import dataclasses
import math

BUCKET_S = 5.0
KEPT_S = 180.0
BASE_S = 60.0  # the mean that is believed as long as nothing speaks against it
JUMPS_S = (5.0, 10.0, 20.0)  # in which a jump shows, the higher the sooner
SURE = 3.0  # standard deviations: chance alone does as much in one look of 700


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """What came in a few seconds."""

    from_ms: int
    to_ms: int
    requests: float
    prompt_tokens: float  # that prefill has to compute


History = tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected to come, a second; what comes now; and why that is another number than the mean of the last minute."""

    requests_per_s: float
    prompt_tokens_per_s: float
    now_per_s: float  # requests
    why: str = ""


def remember(history: History, bucket: Bucket) -> History:
    """The history with one more reading; readings of less than `BUCKET_S` are joined, old ones forgotten."""
    last = history[-1] if history else None
    if last and last.to_ms == bucket.from_ms and last.to_ms - last.from_ms < BUCKET_S * 1000:
        requests, tokens = last.requests + bucket.requests, last.prompt_tokens + bucket.prompt_tokens
        history, bucket = history[:-1], Bucket(last.from_ms, bucket.to_ms, requests, tokens)
    return (*(old for old in history if old.to_ms > bucket.to_ms - KEPT_S * 1000), bucket)


def expect(history: History, now_ms: int, ahead_s: float) -> Outlook:
    """What comes `ahead_s` from now: never less than now, for less is what calm decides."""
    base, base_s = _count(history, now_ms, BASE_S)
    if base == 0:
        return Outlook(0.0, 0.0, 0.0)
    tokens = _tokens_per_request(history, now_ms)
    usual = base / base_s
    if jump := _jump(history, now_ms, usual):
        return Outlook(jump, jump * tokens, jump, f"{jump:.1f} requests/s come after {usual:.1f}")
    if rise := _rise(history, now_ms, base, base_s):
        expected = usual + rise * (ahead_s + BASE_S / 2)
        return Outlook(expected, expected * tokens, usual, f"{rise * 60:.1f} requests/s more come each minute")
    return Outlook(usual, usual * tokens, usual)


def _jump(history: History, now_ms: int, usual: float) -> float:
    """The rate that came at once where the last seconds had far more than usual, as much as is nearly certain; else 0."""
    found = 0.0
    for seconds in JUMPS_S:
        count, known_s = _count(history, now_ms, seconds)
        if known_s and count > usual * known_s + SURE * math.sqrt(usual * known_s + 1):
            found = max(found, (count - math.sqrt(count)) / known_s)
    return found


def _rise(history: History, now_ms: int, base: float, base_s: float) -> float:
    """By how much more comes each second, a second, as much as is nearly certain; else 0."""
    before, before_s = _count(history, now_ms, BASE_S, ago_s=base_s)
    if base_s < BASE_S / 2 or before_s < BASE_S / 2:
        return 0.0
    noise = math.sqrt(base / base_s**2 + before / before_s**2)
    more = base / base_s - before / before_s
    return max(0.0, more - noise) / ((base_s + before_s) / 2) if more > 2 * noise else 0.0


def _count(history: History, now_ms: int, seconds: float, ago_s: float = 0.0) -> tuple[float, float]:
    """Requests of the `seconds` that ended `ago_s` before now, and how much of that time is known."""
    until_ms = now_ms - ago_s * 1000
    within = [bucket for bucket in history if until_ms - seconds * 1000 <= bucket.from_ms and bucket.to_ms <= until_ms]
    return sum(bucket.requests for bucket in within), sum(bucket.to_ms - bucket.from_ms for bucket in within) / 1000


def _tokens_per_request(history: History, now_ms: int) -> float:
    within = [bucket for bucket in history if bucket.from_ms >= now_ms - BASE_S * 1000]
    requests = sum(bucket.requests for bucket in within)
    return sum(bucket.prompt_tokens for bucket in within) / requests if requests else 0.0
