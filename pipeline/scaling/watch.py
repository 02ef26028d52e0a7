"""A pool as it is looked at again and again, by who decides and starts nothing: the API, for Prometheus and KEDA, and `--dry-run`."""

from __future__ import annotations

import asyncio
import dataclasses

import structlog

from pipeline.config import AutoscaleSettings
from pipeline.connection import Connection
from pipeline.errors import RedisUnavailable
from pipeline.keys import PoolKeys
from pipeline.queue import STAGES
from pipeline.scaling.measured import Fleet, Known, signals_of
from pipeline.scaling.memory import Memory
from pipeline.scaling.policy import Decision, StageDecision, decide
from pipeline.scaling.reading import Reading, read
from pipeline.scaling.signals import PoolSignals
from pipeline.waiting import wait_at_most

LOOKS = 3  # as many intervals as a look is waited for

log = structlog.get_logger("baton.scaling")


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What was seen, and how many workers there should be."""

    signals: PoolSignals
    decision: Decision


class PoolWatch:
    """One pool. Workers that others are starting are not known here, so what is under way is left to them: where a supervisor scales the
    pool and this watch `defers`, its decisions are told and not ours."""

    def __init__(self, connection: Connection, pool: str, policy: AutoscaleSettings, *, defers: bool = False) -> None:
        self.pool = pool
        self.last: Look | None = None  # rates lie between two readings: before the second one nothing is decided
        self._seen = asyncio.Event()
        self._connection = connection
        self._keys = PoolKeys(pool)
        self._policy = policy
        self._defers = defers
        self._known, self._memory = Known(), Memory()

    async def look(self) -> Look | None:
        """Look, and decide; None the first time. Raises RedisUnavailable."""
        is_first = self._known.last is None
        reading = await read(self._connection, self._keys)
        signals, self._known = signals_of(reading, self._known, Fleet(), itl_s=self._policy.itl_ms / 1000)
        decision = decide(signals, self._policy, self._memory, reading.time_ms)
        self._memory = decision.memory
        told = _as_decided(decision, reading, self._policy.stale_s) if self._defers else decision
        self.last = None if is_first else Look(signals, told)
        if self.last is not None:
            self._seen.set()
        return self.last

    async def seen(self) -> Look:
        """What was seen last; of a process that has just begun, soon. Raises RedisUnavailable where nothing was seen."""
        await wait_at_most(self._seen, LOOKS * self._policy.poll_s)
        if self.last is None:
            raise RedisUnavailable(f"the pool {self.pool} could not be looked at since this process began")
        return self.last

    async def run(self) -> None:
        """Look, for ever. While Redis is away what was seen last stands."""
        while True:
            try:
                await self.look()
            except RedisUnavailable as error:
                log.debug("the pool was not looked at", pool=self.pool, error=str(error))
            await asyncio.sleep(self._policy.poll_s)


def _as_decided(mine: Decision, reading: Reading, stale_s: float) -> Decision:
    prefill, decode = (_stage(stage, mine.stage(stage), reading, stale_s) for stage in STAGES)
    return Decision(prefill, decode, mine.memory)


def _stage(stage: str, mine: StageDecision, reading: Reading, stale_s: float) -> StageDecision:
    desired, at_ms = (reading.decided.get(f"{name}:{stage}", "") for name in ("desired", "at"))
    if not (desired.isdecimal() and at_ms.isdecimal()) or reading.time_ms - int(at_ms) > stale_s * 1000:
        return mine  # nobody scales it, or who does has not decided yet: what stands there is of one before
    return StageDecision(int(desired), int(desired), reading.decided.get(f"why:{stage}", ""))
