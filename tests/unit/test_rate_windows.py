"""When a limited key may come again: computed from the window, compared with letting the time pass."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.rate_limits import WINDOW_S, Window, headers_of, refusal


def later(window: Window, seconds: float) -> Window:
    """The same window after some time in which nothing came, as the library's script shifts it."""
    before, before_s = window.before, max(0.0, window.before_s - seconds)
    now, now_s = window.now, max(0.0, window.now_s - seconds)
    if window.now and now_s < WINDOW_S:
        before, before_s, now, now_s = now, now_s, 0, 0.0
    return Window(window.limit, before if before_s else 0, before_s, now, now_s)


WINDOWS = st.builds(
    Window,
    limit=st.integers(1, 1000),
    before=st.integers(0, 1000),
    before_s=st.floats(0.5, 60),
    now=st.integers(1, 1000),
    now_s=st.floats(60.5, 120),
)


@given(WINDOWS, st.integers(1, 1000))
@settings(max_examples=500, deadline=None)
def test_it_fits_after_the_wait_and_not_before(window: Window, cost: int) -> None:
    assume(cost <= window.limit)
    wait_s = window.wait_s(cost)
    assert 0 <= wait_s <= 120
    assert later(window, wait_s + 0.01).remaining >= cost
    if wait_s > 0.02:
        assert later(window, wait_s - 0.02).remaining < cost


def test_what_is_larger_than_the_limit_never_fits() -> None:
    error = refusal(Window(10, now=3, now_s=100), "tokens", 11)
    assert math.isinf(Window(10).wait_s(11))
    assert not error.retryable
    assert "never fits" in str(error)


@pytest.mark.parametrize(
    ("window", "remaining", "reset"),
    [
        (Window(10), "10", "0.000s"),
        (Window(10, now=4, now_s=90), "6", "90.000s"),
        (Window(10, before=10, before_s=30), "5", "30.000s"),
        (Window(10, before=10, before_s=30, now=5, now_s=90), "0", "90.000s"),
    ],
)
def test_the_headers(window: Window, remaining: str, reset: str) -> None:
    assert headers_of(window, "tokens") == {
        "x-ratelimit-limit-tokens": "10",
        "x-ratelimit-remaining-tokens": remaining,
        "x-ratelimit-reset-tokens": reset,
    }
