"""From what the clients saw to figures.

Each token after the first is one sample of the inter-token latency (ITL): the first of those that came together has the pause since the
last ones, the others 0. TPOT is the time from first to last token over the tokens after the first. Times to first token count from
when a request was due.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.load import Seen

TTFT_LIMIT_S, TOKEN_LIMIT_S = 1.0, 0.025


def figures(seen: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Of one rate: in all, and by kind. `seconds`: how long requests were sent."""
    whole = [one for one in seen if one.is_whole]
    ends = [one.arrivals[-1][0] for one in whole]
    lasted_s = max(ends) - min(one.due_s for one in seen) if ends else 0.0
    by_kind = {kind: _kind(kind, seen, seconds) for kind in dict.fromkeys(one.kind for one in seen)}
    return {
        "requests": len(seen),
        "whole": len(whole),
        "failed": [one.error or f"{one.tokens} of {one.asked_tokens} tokens" for one in seen if not one.is_whole][:5],
        "tokens_per_s": sum(one.tokens for one in seen) / lasted_s if lasted_s else 0.0,
        "lasted_s": lasted_s,
        "sent_late_ms": spread([1e3 * (one.sent_s - one.due_s) for one in seen if one.sent_s]),
        "good_by_tpot": sum(map(_is_good_by_tpot, whole)),
        "good_by_itl_p99": sum(map(_is_good_by_itl, whole)),
        "goodput_by_tpot_per_s": sum(map(_is_good_by_tpot, whole)) / seconds,
        "goodput_by_itl_p99_per_s": sum(map(_is_good_by_itl, whole)) / seconds,
        "kinds": by_kind,
    }


def _kind(kind: str, seen: Sequence[Seen], seconds: float) -> dict[str, Any]:
    whole = [one for one in seen if one.kind == kind and one.is_whole]
    return {
        "requests": sum(one.kind == kind for one in seen),
        "whole": len(whole),
        "ttft_ms": spread([1e3 * ttft_s(one) for one in whole]),
        "itl_ms": spread([1e3 * gap for one in whole for gap in itls_s(one)]),
        "tpot_ms": spread([1e3 * tpot_s(one) for one in whole]),
        "good_by_tpot": sum(map(_is_good_by_tpot, whole)),
        "good_by_itl_p99": sum(map(_is_good_by_itl, whole)),
        "tokens_per_s": sum(one.tokens for one in whole) / seconds,
    }


def ttft_s(one: Seen) -> float:
    """Time to first token."""
    return one.arrivals[0][0] - one.due_s


def itls_s(one: Seen) -> list[float]:
    """One for each token after the first."""
    gaps = [0.0] * (one.arrivals[0][1] - 1)
    for (before, _), (at, count) in zip(one.arrivals, one.arrivals[1:], strict=False):
        gaps += [at - before] + [0.0] * (count - 1)
    return gaps


def tpot_s(one: Seen) -> float:
    """Mean time of a token after the first."""
    return (one.arrivals[-1][0] - one.arrivals[0][0]) / max(1, one.tokens - 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tails and the worst."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
    return {name: round(value, 3) for name, value in {**found, "max": ordered[-1]}.items()}


def _is_good_by_tpot(one: Seen) -> bool:
    return ttft_s(one) <= TTFT_LIMIT_S and tpot_s(one) <= TOKEN_LIMIT_S


def _is_good_by_itl(one: Seen) -> bool:
    return ttft_s(one) <= TTFT_LIMIT_S and spread(itls_s(one)).get("p99", 0.0) <= TOKEN_LIMIT_S
