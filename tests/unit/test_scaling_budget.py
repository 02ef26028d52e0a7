"""Who gets the GPUs that both stages want."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import AutoscaleSettings, StageScaling
from pipeline.scaling.budget import gpus, shares

COUNT = st.integers(0, 20)


def policy(budget: int, prefill_gpus: int = 1, decode_gpus: int = 1, least: int = 0) -> AutoscaleSettings:
    stages = [StageScaling(min_workers=least, max_workers=99, gpus=gpus) for gpus in (prefill_gpus, decode_gpus)]
    return AutoscaleSettings(gpu_budget=budget, prefill=stages[0], decode=stages[1])


def test_what_fits_is_given():
    assert shares({"prefill": 3, "decode": 5}, policy(8)) == {"prefill": 3, "decode": 5}
    assert shares({"prefill": 30, "decode": 50}, policy(0)) == {"prefill": 30, "decode": 50}


def test_what_does_not_fit_is_shared_by_need():
    assert shares({"prefill": 12, "decode": 4}, policy(8)) == {"prefill": 6, "decode": 2}


def test_a_single_gpu_goes_to_decode_which_can_do_both():
    assert shares({"prefill": 9, "decode": 1}, policy(1)) == {"prefill": 0, "decode": 1}


def test_minima_come_first():
    assert shares({"prefill": 1, "decode": 50}, policy(4, least=1)) == {"prefill": 1, "decode": 3}


def test_what_a_large_worker_leaves_goes_to_the_other_stage():
    assert shares({"prefill": 2, "decode": 9}, policy(7, prefill_gpus=4)) == {"prefill": 1, "decode": 3}


@given(COUNT, COUNT, COUNT, st.integers(1, 30), st.integers(0, 4), st.integers(0, 4))
def test_shares_fit_and_a_greater_need_never_gets_less(prefill, decode, more, budget, prefill_gpus, decode_gpus):
    said = policy(budget, prefill_gpus, decode_gpus)
    given_ = shares({"prefill": prefill, "decode": decode}, said)
    assert gpus(given_, said) <= budget
    assert given_["prefill"] <= prefill
    assert given_["decode"] <= decode
    assert shares({"prefill": prefill + more, "decode": decode}, said)["prefill"] >= given_["prefill"]
    assert shares({"prefill": prefill, "decode": decode + more}, said)["decode"] >= given_["decode"]
