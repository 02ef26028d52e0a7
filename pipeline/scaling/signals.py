"""What `decide` knows of a pool: values alone, read elsewhere in one call.

Every number may be None: it is not known. One that is negative, not finite or absurdly large is not believed either; what needs it is held.
Rates are those of the time since the reading before. Promises are made to all lanes but `low`: batches fill whatever there is, so what
they send says nothing of what is needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

Number = int | float | None

BELIEVED = 1e14  # nothing that is counted here is larger, a time in ms included
UNPROMISED = ("low",)


@dataclasses.dataclass(frozen=True, slots=True)
class LaneSignals:
    """One lane of a stage. Arrivals are of requests that began here: hand-overs, retries and moves are none."""

    waiting: Number = None  # tasks
    prompt_tokens: Number = None  # of these
    oldest_s: Number = None  # age of what has waited longest; needed where anything waits
    arrivals_per_s: Number = None
    prompt_tokens_per_s: Number = None  # of these


@dataclasses.dataclass(frozen=True, slots=True)
class StageSignals:
    """One stage: its lanes by name, its workers. A worker is starting until its first heartbeat, and draining from the moment it was told
    to go; neither is among those alive."""

    lanes: Mapping[str, LaneSignals] = dataclasses.field(default_factory=dict)
    served_per_s: Number = None  # tasks
    predicted_wait_s: Number = None  # of a task that comes now
    running: Number = None  # prompts in prefill, choices in decode
    blocks_used: Number = None
    blocks_total: Number = None  # of the workers alive
    alive: Number = None
    starting: Number = None
    draining: Number = None
    start_s: Number = None  # measured: from a worker's start to its first heartbeat

    @property
    def is_called(self) -> bool:
        """Whether anything waits, on any lane."""
        return any(number(lane.waiting) > 0 for lane in self.lanes.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing comes, waits or runs, and that is certain."""
        said = [value for lane in self.lanes.values() for value in (lane.waiting, lane.arrivals_per_s)]
        return bool(said) and all(value == 0 for value in (*said, self.running))

    def promised(self, field: str) -> float:
        """The sum of a number over the lanes that promises are made to."""
        return sum(number(getattr(lane, field)) for name, lane in self.lanes.items() if name not in UNPROMISED)

    @property
    def oldest_s(self) -> float:
        """The longest that a task has waited on such a lane."""
        return max((number(lane.oldest_s) for name, lane in self.lanes.items() if name not in UNPROMISED), default=0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured of this pool's engines and requests, moving averages."""

    prompt_token_s: Number = None  # seconds a prompt token takes on one prefill worker
    inter_token_s: Number = None  # between two tokens of a sequence
    answer_tokens: Number = None  # of a request, all its choices
    blocks_per_sequence: Number = None
    sequences_per_worker: Number = None  # that a decode worker runs while the inter-token promise holds


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSignals:
    """One reading of a pool. The `local` ones are of prompts that run on decode only for want of a prefill worker (lane `low` left out):
    demand for prefill."""

    clock_ms: Number = None  # of Redis, as all times
    local_prompt_tokens_per_s: Number = 0.0
    local_prompt_tokens: Number = 0  # such that wait
    prefill: StageSignals = StageSignals()
    decode: StageSignals = StageSignals()
    speeds: Speeds = Speeds()

    def stage(self, name: str) -> StageSignals:
        """The signals of a stage by its name."""
        return self.prefill if name == "prefill" else self.decode

    @property
    def requests_per_s(self) -> float:
        """Promised requests that came, whatever stage they began in."""
        return self.prefill.promised("arrivals_per_s") + self.decode.promised("arrivals_per_s")

    @property
    def prompt_tokens_per_s(self) -> float:
        """Promised prompt tokens that came for prefill."""
        return self.prefill.promised("prompt_tokens_per_s") + number(self.local_prompt_tokens_per_s)


def believed(value: Number) -> bool:
    """Whether a number is there and can be true: finite, not negative, not absurdly large."""
    return value is not None and math.isfinite(value) and 0 <= value <= BELIEVED


def number(value: Number) -> float:
    """A number that is believed; 0 for one that is not."""
    return float(value) if value is not None and believed(value) else 0.0


def doubt(signals: PoolSignals, name: str = "", *, is_asleep: bool = False) -> str:
    """The first signal of a stage (without one, of what is expected to come) that is missing, though it is needed, or cannot be true; empty
    when all is well. A pool that is asleep needs no speeds."""
    for what, value, is_needed in _of_stage(signals, name, not is_asleep) if name else _of_arrivals(signals):
        if value is None and is_needed:
            return f"{what} is not known"
        if value is not None and not believed(value):
            return f"{what} cannot be {value:g}"
    return ""


def _of_arrivals(signals: PoolSignals) -> Iterator[tuple[str, Number, bool]]:
    for name in ("prefill", "decode"):
        lanes = signals.stage(name).lanes
        yield f"{name} lanes", len(lanes) or None, True
        for lane, said in lanes.items():
            yield f"{name} arrivals_per_s on {lane}", said.arrivals_per_s, True
            yield f"{name} prompt_tokens_per_s on {lane}", said.prompt_tokens_per_s, True
    yield "local_prompt_tokens_per_s", signals.local_prompt_tokens_per_s, True


def _of_stage(signals: PoolSignals, name: str, needs_speeds: bool) -> Iterator[tuple[str, Number, bool]]:
    stage, speeds = signals.stage(name), signals.speeds
    for field in ("alive", "starting", "draining", "running"):
        yield f"{name} {field}", getattr(stage, field), True
    for field in ("served_per_s", "predicted_wait_s", "start_s", "blocks_used", "blocks_total"):
        yield f"{name} {field}", getattr(stage, field), False
    for lane, said in stage.lanes.items():
        yield f"{name} waiting on {lane}", said.waiting, True
        yield f"{name} prompt_tokens on {lane}", said.prompt_tokens, True
        yield f"{name} oldest_s on {lane}", said.oldest_s, bool(said.waiting)
    if name == "prefill":
        yield "local_prompt_tokens", signals.local_prompt_tokens, True
        yield "prompt_token_s", speeds.prompt_token_s, needs_speeds
        return
    yield "answer_tokens", speeds.answer_tokens or None, needs_speeds
    yield "sequences_per_worker", speeds.sequences_per_worker or None, needs_speeds
    yield "inter_token_s", speeds.inter_token_s, False
    yield "blocks_per_sequence", speeds.blocks_per_sequence, False
