"""What `/health` says of a pool is a function of what the pool looks like."""

from __future__ import annotations

import msgspec
import pytest

from api.probes import pool_health
from pipeline.snapshot import PoolSnapshot


def pool(waiting: dict[str, int] | None = None, **paused: list[bool]) -> PoolSnapshot:
    """A pool with these workers of each stage, as each says whether it is paused."""
    return PoolSnapshot(
        counters={f"waiting:{stage}:default": count for stage, count in (waiting or {}).items()},
        workers={
            stage: {f"{stage}-{n}": msgspec.json.encode({"paused": is_paused}) for n, is_paused in enumerate(said)}
            for stage, said in paused.items()
        },
    )


@pytest.mark.parametrize(
    ("snapshot", "status", "problems"),
    [
        (pool(prefill=[False], decode=[False]), "ok", []),
        (pool(prefill=[True, False], decode=[False, True]), "ok", []),
        (
            pool(prefill=[True, True], decode=[False]),
            "unavailable",
            ["all prefill workers are paused: requests wait until one resumes, or for their deadline"],
        ),
        (
            pool(prefill=[False], decode=[True]),
            "unavailable",
            ["all decode workers are paused: requests wait until one resumes, or for their deadline"],
        ),
        (pool(prefill=[], decode=[False]), "degraded", ["no prefill worker is alive: decode workers prefill"]),
        (pool(prefill=[False], decode=[False], embed=[]), "ok", []),
        (
            pool({"embed": 1}, prefill=[False], decode=[False], embed=[]),
            "degraded",
            ["1 task on queue embed, and no worker of it is alive"],
        ),
        (
            pool({"embed": 2}, prefill=[False], decode=[False], embed=[True]),
            "degraded",
            ["2 tasks on queue embed, and all its workers are paused"],
        ),
        (pool({"embed": 2}, prefill=[False], decode=[False], embed=[False]), "ok", []),
    ],
)
def test_health_tells_who_cannot_be_answered(snapshot: PoolSnapshot, status: str, problems: list[str]) -> None:
    told = pool_health(snapshot, None, [])
    assert (told["status"], told["problems"]) == (status, problems)


def test_a_worker_that_says_nothing_is_taken_to_work() -> None:
    assert pool_health(PoolSnapshot(workers={"prefill": {"p": b""}, "decode": {"d": b"{"}}), None, [])["status"] == "ok"


def test_what_waits_and_who_lives_is_counted_for_queues_of_ones_own_too() -> None:
    told = pool_health(pool({"embed": 2}, prefill=[False], decode=[False], embed=[True]), None, [])
    assert told["workers"] == {"prefill": 1, "decode": 1, "api": 0, "embed": 1}
    assert told["waiting"] == {"prefill": 0, "decode": 0, "embed": 2}
