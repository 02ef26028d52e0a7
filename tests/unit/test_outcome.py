"""What a handler raises becomes an outcome of its task."""

from __future__ import annotations

import pytest

from pipeline import errors
from workers.outcome import Dropped, Fail, Reject, Retry, classify


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.WireError("bad bytes"), Reject("bad bytes")),
        (errors.Unservable("no sliding windows"), Fail("no sliding windows")),
        (errors.EngineDied("gone"), Retry("gone", is_suspect=True)),
        (errors.RedisUnavailable("away"), Retry("away")),
        (errors.DeadlineExceeded("late", stage="decode"), Dropped("late")),
        (errors.EngineDown("down"), Retry("down", counts=False)),
        (errors.TransferError("full"), Retry("full", backs_off=True)),
        (KeyError("x"), Retry("KeyError: 'x'", backs_off=True)),
    ],
)
def test_classify(error: Exception, outcome: object) -> None:
    assert classify(error) == outcome
