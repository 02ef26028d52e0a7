"""What a worker says of its tasks in its log, and how many of each kind it has had.

Messages are constant and the rest is in fields; on a console `pipeline.logs` writes them as a Celery user knows them.
"""

from __future__ import annotations

import collections
import dataclasses

import structlog

from pipeline.queue import Brief, Delivery
from workers.outcome import Answer, Done, Dropped, Fail, Handover, Outcome, Reject, Retry

log = structlog.get_logger("baton.worker")


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """A line on the end of a delivery; `attempts`: after how many a task was dead-lettered."""

    message: str
    why: str = ""
    level: str = "info"
    attempts: int = 0


class Reports:
    """Says each delivery and each outcome once; `totals` counts deliveries by task."""

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.clock = 0  # moves with everything that happens here

    def received(self, delivery: Delivery, task: str) -> None:
        """A task was claimed; `task` is its name, which is the stage's only where that is Baton's own."""
        self.totals[task] += 1
        self.clock += 1
        log.info("task received", task=task, request_id=delivery.id, epoch=delivery.epoch, lane=delivery.lane)

    def settled(self, delivery: Delivery, task: str, told: Told, seconds: float) -> None:
        """A task's outcome was said to Redis."""
        self.clock += 1
        fields: dict[str, object] = {"why": told.why} if told.why else {}
        if told.attempts:
            fields |= {"attempts": told.attempts, "then": f"`baton dead show {delivery.id}`"}
        getattr(log, told.level)(
            told.message, task=task, request_id=delivery.id, epoch=delivery.epoch, seconds=round(seconds, 4), **fields
        )


def told(outcome: Outcome, answer: Answer, attempts: int) -> Told:
    """The line for an outcome that Redis took; `attempts`: deliveries before this one that made no progress."""
    match outcome:
        case Done():
            return Told("task succeeded")
        case Handover():
            return Told("task succeeded", "handed over")
        case Retry(why) if answer is Answer.DEAD:
            return Told("task dead-lettered", why, "error", attempts + outcome.counts)
        case Retry(why):
            return Told("task retry", why, "warning")
        case Fail(why):
            return Told("task raised", why, "warning")
        case Reject(why):
            return Told("task rejected", why, "error", attempts + 1)
        case Dropped(why):
            return Told("task dropped", why)


def lost(why: str, brief: Brief | None) -> Told:
    """The line for a task that is not this delivery's any more, for the reason `why`, by how its request stands now."""
    if brief is None:
        return Told("task dropped", "its record has expired")
    match brief.state:
        case "cancelled" if brief.reason == "revoked":
            return Told("task revoked")
        case "cancelled":
            return Told("task cancelled", brief.reason)
        case "expired":
            return Told("task expired", brief.reason)
        case "done":
            return Told("task dropped", "lease lost, finished by another worker")
        case "failed" | "dead":
            return Told("task dropped", f"ended elsewhere as {brief.state}: {brief.reason}")
        case _:
            return Told("task dropped", f"{why or 'lease lost'}: it waits or runs elsewhere")
