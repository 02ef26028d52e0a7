"""How many requests of a batch are under way: a function of what the pool looks like."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches.gate import AHEAD, LEAST, Load, load_of, next_window
from pipeline.snapshot import PoolSnapshot

SHARE = 0.1


def load(
    slots: int = 100, live: int = 0, live_waiting: int = 0, low_waiting: int = 0, blocks_used: float = 0.0, prefilling: int = 0
) -> Load:  # fmt: skip
    return Load(slots, live, live_waiting, prefilling, low_waiting, blocks_used)


def settled(slots: int, live: int, *, most: int = 1000, window: int = LEAST) -> list[int]:
    """Windows of a pool on which as many live requests run, look after look, until they stay."""
    windows = [window]
    while len(windows) < 3 or windows[-1] != windows[-2]:
        seen = load(slots, live, low_waiting=max(0, live + windows[-1] - slots))
        windows.append(next_window(windows[-1], windows[-1], seen, most=most, live_share=SHARE))
    return windows


def test_alone_a_batch_fills_all_slots_in_a_few_looks() -> None:
    windows = settled(100, live=0)
    assert windows == sorted(windows)
    assert windows[-1] == 100 + AHEAD * 100
    assert len(windows) < 9


@given(st.integers(1, 500), st.data())
def test_beside_live_requests_it_takes_what_they_leave(slots: int, data: st.DataObject) -> None:
    live = data.draw(st.integers(1, slots))
    windows = settled(slots, live)
    assert windows[-1] == max(LEAST, int(slots - live - SHARE * slots))
    fewer = settled(slots, live, window=windows[-1] * 2)
    assert fewer[1] <= windows[-1]  # it shrinks at once


def test_while_live_requests_wait_it_halves_what_is_under_way() -> None:
    waiting = load(live=20, live_waiting=1, low_waiting=20)
    assert next_window(80, 80, waiting, most=1000, live_share=SHARE) == 40
    assert next_window(80, 30, waiting, most=1000, live_share=SHARE) == 15  # of a window that was not full
    assert next_window(3, 3, waiting, most=1000, live_share=SHARE) == LEAST


def test_without_free_blocks_it_does_not_grow() -> None:
    full = load(slots=1000, low_waiting=10, blocks_used=0.95)
    assert next_window(50, 50, full, most=1000, live_share=SHARE) <= 40
    roomy = load(slots=1000, low_waiting=10, blocks_used=0.5)
    assert next_window(500, 50, roomy, most=1000, live_share=SHARE) > 500


def test_requests_in_prefill_hold_no_slot_yet() -> None:
    filling = load(slots=100, live=50, prefilling=7)
    assert next_window(100, 40, filling, most=1000, live_share=SHARE) == 100 - 50 - 10 + 7


def test_without_workers_it_trickles() -> None:
    assert next_window(500, 500, load(slots=0), most=1000, live_share=SHARE) == LEAST


@given(
    st.builds(
        Load, st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 9999), st.integers(0, 99), st.integers(0, 9999),
        st.floats(0, 1),
    ),
    st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 5000), st.floats(0, 0.99),
)  # fmt: skip
def test_it_is_never_less_than_the_least_nor_more_than_is_set(
    seen: Load, window: int, in_flight: int, most: int, share: float
) -> None:
    found = next_window(min(window, most), min(in_flight, most), seen, most=most, live_share=share)
    assert min(LEAST, most) <= found <= most


# -- what is known of a pool ----------------------------------------------------------------------------------------------


def said(blocks_used: int, **more: Any) -> bytes:
    stats = {"blocks_used": blocks_used}
    return json.dumps({"engine": {"num_blocks": 100, "max_num_seqs": 8}, "stats": stats, **more}).encode()


def test_a_load_is_that_of_all_decode_workers_that_claim() -> None:
    snapshot = PoolSnapshot(
        counters={
            "waiting:prefill:high": 1, "waiting:prefill:default": 2, "waiting:decode:default": 4,
            "waiting:prefill:low": 8, "waiting:decode:low": 16, "waiting:embed:default": 32,
            "running:prefill:high": 1, "running:prefill:low": 2, "running:decode:default": 4, "running:decode:low": 8,
            "running:embed:default": 16, "running:decode:high": -1,
        },
        workers={
            "prefill": {"p": said(0)},
            "decode": {"a": said(30), "b": said(50), "c": said(0, paused=True), "d": b"", "e": b"\xff{"},
        },
    )  # fmt: skip
    assert load_of(snapshot) == Load(16, live=5, live_waiting=7, low_prefilling=2, low_waiting=24, blocks_used=0.4)
    assert load_of(snapshot, "embed") == Load(
        0, live=16, live_waiting=32, low_prefilling=0, low_waiting=0, blocks_used=0.0
    )
    assert load_of(PoolSnapshot()) == Load(0, 0, 0, 0, 0, 0.0)
