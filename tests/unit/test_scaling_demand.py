"""The formulas: how many workers hold the promises."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import AutoscaleSettings
from pipeline.scaling.demand import LATE, OF_TTFT, decode_need, late_share, prefill_need, servers
from pipeline.scaling.forecast import Outlook
from tests.scaling.pools import SPEEDS, lane, pool, stage

POLICY = AutoscaleSettings()


def outlook(rate: float, of: float = 800.0) -> Outlook:
    return Outlook(rate, rate * of, rate)


def test_what_nobody_asks_for_needs_nobody():
    assert servers(0.0, 0.4, 1.0, 0.85) == 0
    assert prefill_need(pool(), outlook(0.0), POLICY, 30.0).workers == 0
    assert decode_need(pool(), outlook(0.0), POLICY, 30.0).workers == 0


@given(st.floats(0.01, 200), st.floats(0.001, 20), st.floats(0.01, 20), st.floats(0.3, 1.0))
def test_servers_are_the_fewest_that_keep_the_promise_and_the_utilization(load, service_s, slack_s, utilization):
    count = servers(load, service_s, slack_s, utilization)
    assert load / count <= utilization + 1e-9
    assert late_share(load, count, service_s, slack_s) <= LATE
    fewer = count - 1
    assert fewer < 1 or load / fewer > utilization or late_share(load, fewer, service_s, slack_s) > LATE


@pytest.mark.parametrize(("load", "count"), [(0.6, 1), (1.6, 2), (4.0, 5), (9.0, 10)])
def test_the_share_that_is_late_is_about_that_of_a_simulated_queue(load, count):
    chance, service_s, slack_s = random.Random(1), 0.4, 1.6
    free = [0.0] * count
    late, at_s, total = 0, 0.0, 100_000
    for _ in range(total):
        at_s += chance.expovariate(load / service_s)
        first = min(range(count), key=free.__getitem__)
        begins_s = max(at_s, free[first])
        free[first] = begins_s + chance.expovariate(1 / service_s)
        late += begins_s - at_s > slack_s
    assert late_share(load, count, service_s, slack_s) == pytest.approx(late / total, rel=0.35)


def test_more_load_than_servers_is_always_late():
    assert late_share(3.0, 3, 0.4, 100.0) == 1.0


def test_a_tighter_promise_takes_more_prefill_workers():
    needs = [
        prefill_need(pool(), outlook(5.0), AutoscaleSettings(ttft_s=ttft_s), 30.0).workers for ttft_s in (20, 2, 0.9)
    ]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]


def test_a_queue_counts_when_it_takes_longer_than_promised():
    short, long = (pool(stage(lane(5, tokens, rate=0.5))) for tokens in (3000, 300_000))
    assert prefill_need(short, outlook(0.5), POLICY, 30.0).workers == 1
    need = prefill_need(long, outlook(0.5), POLICY, 30.0)
    assert need.workers == math.ceil(0.2 + 300_000 * 0.0005 / 30)
    assert need.flow == 1
    assert need.why == "300,000 prompt tokens wait 150.0 s, promised 2.0 s"


def test_a_queue_is_worked_off_sooner_where_workers_start_sooner():
    queued = pool(stage(lane(50, 30_000, rate=0.5)))
    needs = [prefill_need(queued, outlook(0.5), POLICY, start_s).workers for start_s in (1.0, 5.0, 60.0)]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[-1]


def test_prompts_that_wait_for_decode_to_compute_them_are_in_the_queue():
    queued = pool(local_prompt_tokens=300_000)
    assert prefill_need(queued, outlook(0.0), POLICY, 30.0).workers == 5


def test_decode_follows_littles_law():
    # Given 8 requests a second, each of 250 tokens at 50 ms: 100 run at once, 24 a worker; chance adds 10
    enough = pool(decode=stage(alive=9))
    assert decode_need(enough, outlook(8.0), POLICY, 30.0).workers == math.ceil(110 / 24)


def test_what_piles_up_until_decode_workers_are_there_is_worked_off_as_fast():
    behind = decode_need(pool(decode=stage(alive=1)), outlook(8.0), POLICY, 30.0)
    assert behind.workers == behind.flow == math.ceil((100 + 100 - 24) / 24)


def test_the_time_that_a_prompt_takes_itself_is_no_time_to_wait():
    need = prefill_need(pool(stage(alive=20)), outlook(4.0, of=3000), POLICY, 30.0)
    assert need.workers == servers(6.0, 1.5, OF_TTFT * POLICY.ttft_s, POLICY.utilization)
    assert need.workers > servers(6.0, 1.5, POLICY.ttft_s, POLICY.utilization)


def test_decode_workers_hold_what_runs_and_waits():
    need = decode_need(pool(decode=stage(lane(100), running=44, alive=2)), outlook(0.0), POLICY, 30.0)
    assert (need.workers, need.flow) == (6, 0)
    assert decode_need(pool(decode=stage(running=44, alive=2)), outlook(0.0), POLICY, 30.0).workers == 0


def test_a_promise_that_is_seen_broken_asks_for_one_more_whatever_the_measured_speeds_say():
    late = pool(stage(lane(2, 800, 2.5), alive=3, running=3))
    need = prefill_need(late, outlook(0.5), POLICY, 30.0)
    assert (need.workers, need.flow) == (4, 1)
    assert need.why == "all are busy and a prompt waits 2.5 s, promised 2.0 s"
    idle = pool(stage(lane(2, 800, 2.5), alive=3, running=2))  # one of them could take it: it hangs
    assert prefill_need(idle, outlook(0.5), POLICY, 30.0).workers == 1


def test_tokens_that_come_slower_than_promised_ask_for_one_more_decode_worker():
    slow, noisy = (
        pool(decode=stage(alive=3, running=3), speeds=dataclasses.replace(SPEEDS, inter_token_s=seconds))
        for seconds in (0.054, 0.051)
    )
    past = dataclasses.replace(slow, decode=stage(alive=3, running=2))  # one has nothing to do
    assert decode_need(slow, outlook(1.0), POLICY, 30.0).workers == 4
    assert decode_need(noisy, outlook(1.0), POLICY, 30.0).workers == 1
    assert decode_need(past, outlook(1.0), POLICY, 30.0).workers == 1


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10**8), st.integers(0, 10**8), st.floats(0, 20))
def test_more_queue_never_needs_fewer(tasks, more_tasks, tokens, more_tokens, rate):
    def needs(tasks: int, tokens: int) -> tuple[int, int]:
        said = pool(
            stage(lane(tasks, tokens, 9.0 if tasks else 0.0, rate), running=1), stage(lane(tasks, tokens), running=9)
        )
        return (
            prefill_need(said, outlook(rate), POLICY, 30.0).workers, decode_need(said, outlook(rate), POLICY, 30.0).workers
        )  # fmt: skip

    few, many = needs(tasks, tokens), needs(tasks + more_tasks, tokens + more_tokens)
    assert all(more >= less for less, more in zip(few, many, strict=True))
