"""What a supervisor does about a decision."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from pipeline.cli.gpus import Gpus
from pipeline.cli.supervisor import work_told
from pipeline.config import AutoscaleSettings, StageScaling
from pipeline.scaling.places import (
    Candidate,
    Phase,
    Step,
    Work,
    environment_of,
    first_free,
    next_step,
    who_goes,
    within_gpus,
)

STARTING, WORKING, LEAVING, BROKEN = Phase.STARTING, Phase.WORKING, Phase.LEAVING, Phase.BROKEN
POLICY = AutoscaleSettings(prefill=StageScaling(max_workers=4), decode=StageScaling(max_workers=4, gpus=2))
NONE = {"prefill": 0, "decode": 0}


def test_what_is_missing_is_started_and_what_starts_is_not_missing():
    assert next_step(3, [], 0) == Step(start=3)
    assert next_step(3, [WORKING, STARTING], 0) == Step(start=1)
    assert next_step(3, [WORKING, STARTING, BROKEN], 0) == Step()
    assert next_step(None, [WORKING], 0) == Step()


def test_workers_of_others_count_and_never_go():
    assert next_step(3, [WORKING], 2) == Step()
    assert next_step(1, [WORKING], 2) == Step(let_go=1)
    assert next_step(0, [], 2) == Step()


def test_who_leaves_is_replaced_but_no_more_leave_meanwhile():
    assert next_step(2, [WORKING, LEAVING], 0) == Step(start=1)
    assert next_step(1, [WORKING, WORKING, LEAVING], 0) == Step()
    assert next_step(1, [WORKING, WORKING, WORKING], 0) == Step(let_go=2)


def test_those_go_first_whose_going_costs_nothing():
    ranks = [Candidate(0, WORKING, Work(0)), Candidate(1, STARTING), Candidate(2, BROKEN), Candidate(3, LEAVING)]
    assert who_goes(ranks, 4) == [2, 1, 0]


def test_of_those_that_work_blocks_that_others_need_count_before_tasks_and_silence_is_the_most():
    work = [Work(), Work(2, 0, 0), Work(0, 5, 90), Work(0, 1, 80), Work(0, 1, 20), Work(0, 1, 20)]
    assert who_goes([Candidate(n, WORKING, one) for n, one in enumerate(work)], 6) == [5, 4, 3, 2, 1, 0]


def test_a_place_that_is_free_is_taken_again():
    assert [first_free(set()), first_free({0, 1}), first_free({0, 2})] == [0, 2, 1]


def test_a_gpu_has_one_worker_until_that_has_ended(tmp_path: Path):
    gpus = Gpus(["0", "1", "GPU-7"], tmp_path)
    assert (gpus.take("a", 2), gpus.take("a", 2), gpus.take("b", 1)) == (("0", "1"), None, ("GPU-7",))
    assert (gpus.of_others("a"), gpus.of_others("b"), gpus.take("b", 1)) == (1, 2, None)
    gpus.give_back(("0",))
    assert gpus.take("b", 1) == ("0",)


def test_who_else_deals_out_a_gpu_is_kept_off_as_long_as_it_is_taken(tmp_path: Path):
    gpus, others = Gpus(["0", "1", "MIG/7"], tmp_path), Gpus(["1", "MIG/7", "2"], tmp_path)
    assert (gpus.take("a", 2), others.take("a", 3)) == (("0", "1"), None)
    assert others.take("a", 2) == ("MIG/7", "2")  # what was locked in vain is free
    assert gpus.take("a", 1) is None
    assert (gpus.of_others("a"), others.of_others("a")) == (1, 1)
    gpus.give_back(("1",))
    assert (gpus.of_others("a"), others.of_others("a")) == (1, 0)
    assert others.take("a", 1) == ("1",)


def test_a_gpu_that_cannot_be_locked_is_not_ours(tmp_path: Path):
    gpus = Gpus(["0"], tmp_path / "none")
    assert (gpus.take("a", 1), gpus.of_others("a")) == (None, 1)
    assert Gpus([], tmp_path / "none").take("a", 1) == ()


def test_other_users_can_lock_what_one_has_made(tmp_path: Path):
    before = os.umask(0o077)
    try:
        Gpus(["0"], tmp_path).take("a", 1)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_without_a_list_of_gpus_workers_find_theirs_themselves():
    gpus = Gpus([])
    assert (gpus.take("a", 1), gpus.take("a", 1)) == ((), ())
    assert environment_of(gpus.names, ()) == {}
    assert environment_of(["0", "1"], ("1",)) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert environment_of(["0", "1"], ()) == {"CUDA_VISIBLE_DEVICES": ""}  # one without may not take another's


def test_the_budget_is_what_other_pools_leave():
    devices = ["0", "1", "2", "3"]
    assert within_gpus(POLICY, [], 0, NONE) is POLICY
    assert within_gpus(POLICY, devices, 0, NONE).gpu_budget == 4
    assert within_gpus(POLICY, devices, 1, NONE).gpu_budget == 3
    assert within_gpus(POLICY, devices, 1, {"prefill": 1, "decode": 1}).gpu_budget == 6
    assert within_gpus(msgspec.structs.replace(POLICY, gpu_budget=2), devices, 0, NONE).gpu_budget == 2


def test_where_others_have_all_gpus_there_is_none():
    policy = within_gpus(POLICY, ["0"], 1, NONE)
    assert (policy.prefill.max_workers, policy.decode.max_workers, policy.gpu_budget) == (0, 0, 0)


def test_what_a_worker_says_of_its_work():
    pool = {"running": 2, "waiting": 1, "blocks_used": 7}
    assert work_told({"pool": pool, "transfer": {"handles": 4}}) == Work(4, 3, 7)
    assert work_told({"held": 5, "pool": pool, "transfer": {"handles": 4}}) == Work(4, 5, 7)  # claimed a moment ago
    assert work_told({"pool": pool}) == Work()
    assert work_told(None) == Work()
