"""What is expected to come: noise is none, a jump is one at once, a trend goes on."""

from __future__ import annotations

import random

import pytest

from pipeline.scaling.forecast import BUCKET_S, KEPT_S, Bucket, History, expect, remember

STEP_MS = 5000


def history(*rates: float, of: float = 800.0, step_ms: int = STEP_MS) -> tuple[History, int]:
    """Readings one after the other, and the time of the last."""
    kept: History = ()
    for at, rate in enumerate(rates):
        requests = rate * step_ms / 1000
        kept = remember(kept, Bucket(at * step_ms, (at + 1) * step_ms, requests, requests * of))
    return kept, len(rates) * step_ms


def test_without_arrivals_nothing_is_expected():
    assert expect((), 0, 30.0).requests_per_s == 0
    assert expect(*history(0, 0, 0), 30.0).prompt_tokens_per_s == 0


def test_what_came_evenly_is_what_is_expected():
    outlook = expect(*history(*[4.0] * 30), 60.0)
    assert (outlook.requests_per_s, outlook.prompt_tokens_per_s, outlook.why) == (4.0, 3200.0, "")


@pytest.mark.parametrize("level", [1.0, 4.0, 20.0])
def test_chance_alone_is_seldom_taken_for_more(level):
    chance = random.Random(1)
    rates = [_poisson(chance, level * 5) / 5 for _ in range(1000)]
    kept: History = ()
    far = 0
    for at, rate in enumerate(rates):
        kept = remember(kept, Bucket(at * STEP_MS, (at + 1) * STEP_MS, rate * 5, rate * 5))
        far += expect(kept, (at + 1) * STEP_MS, 30.0).requests_per_s > level * 2 + 1
    assert far < 20


def test_a_jump_is_believed_within_one_look():
    before = expect(*history(*[2.0] * 24), 30.0)
    after = expect(*history(*[2.0] * 24, 10.0), 30.0)
    assert before.requests_per_s == 2.0
    assert after.requests_per_s > 7
    assert after.why == f"{after.requests_per_s:.1f} requests/s come after 2.7"


def test_out_of_silence_what_comes_is_the_jump():
    assert expect(*history(*[0.0] * 24, 6.0), 30.0).requests_per_s > 4


def test_a_trend_goes_on_until_the_worker_is_there():
    kept, now_ms = history(*[0.2 * at for at in range(36)])
    soon, later = expect(kept, now_ms, 5.0), expect(kept, now_ms, 60.0)
    assert 6.0 < soon.requests_per_s < later.requests_per_s < 12.0
    assert "more come each minute" in later.why


def test_less_is_not_foretold():
    kept, now_ms = history(*[0.2 * at for at in range(36, 0, -1)])
    assert expect(kept, now_ms, 60.0).requests_per_s == pytest.approx(sum(0.2 * at for at in range(1, 13)) / 12)


def test_longer_prompts_count_at_once():
    kept, now_ms = history(*[4.0] * 12, of=800.0)
    kept = remember(kept, Bucket(now_ms, now_ms + STEP_MS, 20.0, 80_000.0))
    assert expect(kept, now_ms + STEP_MS, 0.0).prompt_tokens_per_s > 4000


@pytest.mark.parametrize("step_ms", [200, 1000, 5000, 20_000])
def test_history_is_bounded_and_whole_at_any_pace(step_ms):
    kept, now_ms = history(*[3.0] * 2000, step_ms=step_ms)
    assert len(kept) <= KEPT_S / BUCKET_S + 2
    assert expect(kept, now_ms, 30.0).requests_per_s == pytest.approx(3.0)
    assert kept[-1].to_ms == now_ms


def _poisson(chance: random.Random, mean: float) -> int:
    count, at = 0, chance.expovariate(1.0)
    while at < mean:
        count, at = count + 1, at + chance.expovariate(1.0)
    return count
