"""What a worker says of its tasks in its log, and how many of each kind it has had.

Messages are constant and the rest is in fields; on a console `pipeline.logs` writes them as a Celery user knows them.
"""

from __future__ import annotations

import collections

import structlog

from pipeline.queue import Delivery
from workers.outcome import Done, Dropped, Fail, Handover, Outcome, Reject, Retry

ENDED_ELSEWHERE = ("ended elsewhere", "ended")  # cancelled, as a rule; else the task is another worker's now

log = structlog.get_logger("baton.worker")


class Reports:
    """Says each delivery and each outcome once; `totals` counts deliveries by task."""

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.clock = 0  # moves with everything that happens here

    def received(self, delivery: Delivery) -> None:
        """A task was claimed."""
        self.totals[delivery.stage] += 1
        self.clock += 1
        log.info("task received", task=delivery.stage, request_id=delivery.id, epoch=delivery.epoch, lane=delivery.lane)

    def settled(self, delivery: Delivery, outcome: Outcome, seconds: float) -> None:
        """A task's outcome was said to Redis."""
        self.clock += 1
        message, why = told(outcome)
        say = log.warning if isinstance(outcome, (Retry, Reject, Fail)) else log.info
        say(
            message, task=delivery.stage, request_id=delivery.id, epoch=delivery.epoch, seconds=round(seconds, 4),
            **({"why": why} if why else {}),
        )  # fmt: skip


def told(outcome: Outcome) -> tuple[str, str]:
    """The message that stands for an outcome, and why it came."""
    match outcome:
        case Done():
            return "task succeeded", ""
        case Handover():
            return "task succeeded", "handed over"
        case Retry(why):
            return "task retry", why
        case Fail(why):
            return "task raised", why
        case Reject(why):
            return "task rejected", why
        case Dropped(why):
            return "task revoked" if why in ENDED_ELSEWHERE else "task dropped", why
