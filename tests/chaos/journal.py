"""What happened to each request, as its client saw it, and how long the streams that a fault touched took to go on."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from pipeline.errors import BatonError
from tests.chaos.fleet import Fleet, Member
from tests.chaos.shapes import Shape

# how a request ended for its client
DONE = "done"
LEFT = "client left"  # cancelled by us
REFUSED = "refused"  # before it was accepted
DIED = "API died"  # the connection, with the API behind it
FAILED = "failed"
HUNG = "hung"
OUTCOMES = (DONE, LEFT, REFUSED, DIED, FAILED, HUNG)


@dataclasses.dataclass(eq=False)
class Record:
    """One request of one client."""

    shape: Shape
    how: str  # direct, stream, whole, slow, resumed
    api: Member | None
    began_s: float
    id: str = ""  # empty until an answer has named it
    ended_s: float = 0.0
    outcome: str = ""
    reason: str = ""
    touched_s: float = 0.0  # the first fault that its next token has to get over
    recoveries: int = 0
    wrong: str = ""  # what its client saw that it should not have
    repeated: int = 0  # tokens that its client saw twice
    seen: list[Any] = dataclasses.field(
        default_factory=list
    )  # tokens or texts, kept where they are not what was expected


class Journal:
    """All requests of a run."""

    def __init__(self, fleet: Fleet) -> None:
        self.records: list[Record] = []
        self.live: dict[str, Record] = {}  # streams by their request's id
        self.recoveries_s: list[float] = []
        self._fleet = fleet

    def begin(self, shape: Shape, how: str, api: Member | None = None) -> Record:
        """A client asks."""
        record = Record(shape, how, api, time.monotonic())
        self.records.append(record)
        return record

    def name(self, record: Record, request_id: str) -> None:
        """Its id is known: from now on faults may touch it."""
        record.id = request_id
        if record.how != "whole":
            self.live[request_id] = record

    def progress(self, record: Record) -> None:
        """Its client got a token, or a right end: it is over every fault so far."""
        if record.touched_s:
            self.recoveries_s.append(time.monotonic() - record.touched_s)
            record.touched_s = 0.0
            record.recoveries += 1

    def end(self, record: Record, outcome: str, reason: str = "") -> None:
        """Its client is through with it."""
        record.outcome, record.reason, record.ended_s = outcome, reason, time.monotonic()
        if outcome == DONE:
            self.progress(record)
        self.live.pop(record.id, None)

    def touch_all(self) -> None:
        """A fault touches every stream."""
        self._touch(list(self.live.values()))

    async def touch(self, member: Member) -> None:
        """A fault of this member: it touches what a worker holds. The clients of an API see their connection die instead."""
        if member.role == "api":
            return
        command, keys = self._fleet.system.connection.commands, self._fleet.system.keys
        records = list(self.live.values())
        try:
            owners = await command(*(("HGET", keys.request(r.id), "owner") for r in records)) if records else []
        except BatonError:
            return  # Redis is away: that fault touches all of them anyway
        self._touch([r for r, owner in zip(records, owners, strict=True) if owner == member.name.encode()])

    def _touch(self, records: list[Record]) -> None:
        for record in records:
            record.touched_s = record.touched_s or time.monotonic()
