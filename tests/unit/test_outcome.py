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
        (errors.TimeLimitExceeded("10 s passed"), Fail("10 s passed")),
        (errors.SoftTimeLimitExceeded("5 s passed"), Fail("5 s passed")),
        (errors.RetryLater("busy"), Retry("busy", backs_off=True)),
        (errors.RetryLater("busy", countdown=0), Retry("busy", countdown=0)),
        (errors.TransferError("full"), Retry("full", backs_off=True)),
        (KeyError("x"), Retry("KeyError: 'x'", backs_off=True)),
    ],
)
def test_classify(error: Exception, outcome: object) -> None:
    assert classify(error) == outcome
