from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.transfers.slabs import Run, SlabMap


@given(st.data())
def test_runs_never_overlap_and_all_space_comes_back(data: st.DataObject):
    slabs = SlabMap(data.draw(st.integers(1, 40)))
    taken: list[Run] = []
    for _ in range(data.draw(st.integers(0, 60))):
        if taken and data.draw(st.booleans()):
            slabs.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            count = data.draw(st.integers(1, 12))
            used = {slab for run in taken for slab in range(run.first, run.end)}
            fits = [
                first for first in range(slabs.num_slabs - count + 1) if used.isdisjoint(range(first, first + count))
            ]
            run = slabs.take(count)
            assert run == (Run(fits[0], count) if fits else None)
            taken += [run] if run else []
        assert slabs.num_free == slabs.num_slabs - sum(run.length for run in taken)
    for run in taken:
        slabs.give_back(run)
    assert slabs.take(slabs.num_slabs) == Run(0, slabs.num_slabs)


def test_what_is_not_taken_cannot_be_given_back():
    slabs = SlabMap(10)
    assert slabs.take(4) == Run(0, 4)
    for run in (Run(4, 1), Run(3, 2), Run(9, 2), Run(-1, 1), Run(0, 0), Run(0, 11)):
        with pytest.raises(ValueError, match=r"free already|outside"):
            slabs.give_back(run)
    slabs.give_back(Run(1, 2))
    with pytest.raises(ValueError, match="free already"):
        slabs.give_back(Run(0, 4))
    slabs.give_back(Run(0, 1))
    slabs.give_back(Run(3, 1))
    assert slabs.take(10) == Run(0, 10)
