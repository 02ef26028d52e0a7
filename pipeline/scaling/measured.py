"""Signals made of readings: rates between two of them, and speeds as they are measured, which outlive the workers they were measured on."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping

from pipeline.queue import LANES, STAGES
from pipeline.said import SaidOfWork, WorkerSaid
from pipeline.scaling.reading import Reading, StageReading
from pipeline.scaling.signals import UNPROMISED, LaneSignals, PoolSignals, Speeds, StageSignals

SLOWLY = 0.2  # of what is new, a look at workers that worked since the last one
LOOKS = 5  # whose step times the time between two tokens is the median of: one step that compiles does not count
ANSWERS = 50  # answers, of whose lengths the moving average is one
MOST_OF_BLOCKS = 0.85  # of a worker's blocks: what is above preempts


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What is kept from look to look. `last`: the reading before; `steps_s`: what a step of decode took, by the last looks that saw any;
    `fitting`: sequences that a worker runs while the promise holds, where more were seen to break it."""

    last: Reading | None = None
    speeds: Speeds = dataclasses.field(default_factory=Speeds)
    steps_s: tuple[float, ...] = ()
    fitting: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """What only who starts workers knows, by stage: those that start, the names of those that were told to go (they say so themselves a
    moment later), and the seconds that a start took."""

    starting: Mapping[str, int] = dataclasses.field(default_factory=dict)
    draining: Mapping[str, Collection[str]] = dataclasses.field(default_factory=dict)
    start_s: Mapping[str, float] = dataclasses.field(default_factory=dict)


def signals_of(now: Reading, known: Known, fleet: Fleet, *, itl_s: float) -> tuple[PoolSignals, Known]:
    """What a reading says beside the one before it. `itl_s`: the inter-token promise, which bounds the sequences of a worker.

    The first reading has no rates, so nothing is decided by it; nor has one whose counters are smaller than before: Redis lost some.
    """
    speeds, kept = _learnt(now, known, itl_s)
    seconds = _seconds(now, known.last)
    stages = {stage: _stage(stage, now, known.last, seconds, fleet) for stage in STAGES}
    waits = _waits(now, stages, speeds)
    stages = {name: dataclasses.replace(stage, predicted_wait_s=waits[name]) for name, stage in stages.items()}
    promised = [lane for lane in LANES if lane not in UNPROMISED]
    has_prefill = bool(now.stages["prefill"].workers)
    signals = PoolSignals(
        clock_ms=now.time_ms,
        local_prompt_tokens_per_s=_rate(now, known.last, seconds, *(("local", lane) for lane in promised)),
        local_prompt_tokens=0 if has_prefill else sum(_claimable("tokens", now, "decode", lane) for lane in promised),
        prefill=stages["prefill"], decode=stages["decode"], speeds=speeds,
    )  # fmt: skip
    return signals, kept


def _seconds(now: Reading, last: Reading | None) -> float:
    """Since the reading before; 0 where there is none that this one goes on from."""
    if last is None or now.time_ms <= last.time_ms:
        return 0.0
    is_less = any(now.count(name) < last.count(name) for name in last.counters if name.startswith("arrived"))
    return 0.0 if is_less else (now.time_ms - last.time_ms) / 1000


def _rate(now: Reading, last: Reading | None, seconds: float, *names: tuple[str, ...]) -> float | None:
    if last is None or not seconds:
        return None
    return sum(now.count(*name) - last.count(*name) for name in names) / seconds


def _stage(stage: str, now: Reading, last: Reading | None, seconds: float, fleet: Fleet) -> StageSignals:
    read = now.stages[stage]
    told = fleet.draining.get(stage, ())
    going = {name for name, said in read.workers.items() if said.leaving or name in told}
    claiming = [said for name, said in read.workers.items() if name not in going and said.claims]
    return StageSignals(
        lanes={lane: _lane(stage, lane, now, last, seconds) for lane in LANES},
        served_per_s=_rate(now, last, seconds, *(("claimed", stage, lane) for lane in LANES)),
        running=sum(now.count("running", stage, lane) for lane in LANES),
        blocks_used=sum(said.stats.blocks_used for said in claiming),
        blocks_total=sum(said.engine.num_blocks for said in claiming),
        alive=len(claiming), starting=fleet.starting.get(stage, 0), draining=len(going),
        start_s=fleet.start_s.get(stage),
    )  # fmt: skip


def _lane(stage: str, lane: str, now: Reading, last: Reading | None, seconds: float) -> LaneSignals:
    came_ms = now.stages[stage].oldest_ms.get(lane, 0)
    return LaneSignals(
        waiting=_claimable("waiting", now, stage, lane), prompt_tokens=_claimable("tokens", now, stage, lane),
        oldest_s=max(0.0, (now.time_ms - came_ms) / 1000) if came_ms else 0.0,  # a clock that was set back is behind the stream
        arrivals_per_s=_rate(now, last, seconds, ("arrived", stage, lane)),
        prompt_tokens_per_s=_rate(now, last, seconds, ("arrived_tokens", stage, lane)),
    )  # fmt: skip


def _claimable(what: str, now: Reading, stage: str, lane: str) -> int:
    """Of what waits (`waiting` or `tokens`), what was not admitted for later."""
    later = {"waiting": "later", "tokens": "later_tokens"}[what]
    return max(0, now.count(what, stage, lane) - now.count(later, stage, lane))


def _waits(now: Reading, stages: Mapping[str, StageSignals], speeds: Speeds) -> dict[str, float | None]:
    """How long a task that comes now waits: by its stage's speed, among workers that there are."""
    tokens = sum(_claimable("tokens", now, "prefill", lane) for lane in LANES)
    tasks = sum(_claimable("waiting", now, "decode", lane) for lane in LANES)
    token_s, alive, served = speeds.prompt_token_s, stages["prefill"].alive, stages["decode"].served_per_s
    return {
        "prefill": tokens * token_s / alive if token_s is not None and alive else None,
        "decode": 0.0 if not tasks else tasks / served if served else None,
    }


# -- speeds -----------------------------------------------------------------------------------------------------------


def _learnt(now: Reading, known: Known, itl_s: float) -> tuple[Speeds, Known]:
    """Moving averages and medians, and what is kept of them; what nobody measures now stays as it was."""
    before, last = known.speeds, known.last or Reading()
    prefill, decode = now.stages["prefill"], now.stages["decode"]
    busy = [
        (said, old)
        for said, old in _pairs(decode, last.stages.get("decode"))
        if said.running and said.steps > old.steps
    ]
    running = sum(said.running for said, _ in busy)
    step_s = _mean(took_s for said, old in busy if (took_s := _step_s(said, old)))
    steps_s = known.steps_s if step_s is None else (*known.steps_s[1 - LOOKS :], step_s)
    inter_token_s = statistics.median(steps_s) if steps_s else None
    blocks = _average(before.blocks_per_sequence, _ratio(sum(said.blocks_used for said, _ in busy), running))
    most = _most_sequences(decode, blocks)
    fitting = _fitting(known.fitting, _ratio(running, len(busy)), step_s, inter_token_s, itl_s)
    speeds = Speeds(
        prompt_token_s=_average(before.prompt_token_s, _token_s(prefill, last.stages.get("prefill"))),
        inter_token_s=inter_token_s,
        answer_tokens=_answer_tokens(now, known.last, before.answer_tokens),
        blocks_per_sequence=blocks,
        sequences_per_worker=before.sequences_per_worker if most is None else max(1.0, min(most, fitting or most)),
    )  # fmt: skip
    return speeds, Known(now, speeds, steps_s, fitting)


def _step_s(said: SaidOfWork, old: SaidOfWork) -> float | None:
    """What a step took since the reading before. The first ones of a worker are no measure: they compile and warm up."""
    if not old.steps:
        return None
    return (said.busy_s - old.busy_s) / (said.steps - old.steps)


def _pairs(now: StageReading, before: StageReading | None) -> Iterator[tuple[SaidOfWork, SaidOfWork]]:
    """What the workers do, each beside what it did at the reading before."""
    old = before.workers if before else {}
    return ((said.stats, old.get(name, WorkerSaid()).stats) for name, said in now.workers.items())


def _token_s(now: StageReading, before: StageReading | None) -> float | None:
    """Seconds that a worker was busy for each prompt token since the reading before, those from the prefix cache included: what comes is
    counted with them."""
    busy_s, tokens = 0.0, 0
    for said, old in _pairs(now, before):
        if said.busy_s > old.busy_s:
            busy_s += said.busy_s - old.busy_s
            tokens += max(0, said.prompt_tokens - old.prompt_tokens)
    return _ratio(busy_s, tokens)


def _answer_tokens(now: Reading, last: Reading | None, before: float | None) -> float | None:
    """Tokens of an answer: an average of about the last ANSWERS ones."""
    old = last or Reading()
    answers = now.count("answers") - old.count("answers")
    tokens = now.count("answer_tokens") - old.count("answer_tokens")
    if answers <= 0 or tokens < 0:
        return before
    return tokens / answers if before is None else before + (tokens / answers - before) * min(1.0, answers / ANSWERS)


def _most_sequences(decode: StageReading, blocks: float | None) -> float | None:
    """Sequences that a worker can run: its slots, or what its blocks allow. None without workers."""
    slots = _mean(said.engine.max_num_seqs for said in decode.workers.values())
    if slots is None or not blocks:
        return slots
    room = _mean(said.engine.num_blocks for said in decode.workers.values()) or 0.0
    return min(slots, MOST_OF_BLOCKS * room / blocks)


def _fitting(
    before: float | None, running: float | None, step_s: float | None, inter_token_s: float | None, itl_s: float
) -> float | None:  # fmt: skip
    """Sequences that keep the promise, once more were seen to break it for some looks (`inter_token_s`). A step takes a + b x running, so
    what runs on a worker now tells how many may: where it is too slow, fewer; where it is quick enough, running x promise / step at least.
    While nobody is busy nothing is learnt."""
    if not running or not step_s:
        return before
    measured = running * itl_s / step_s
    if step_s > itl_s and (inter_token_s or 0.0) > itl_s:
        return measured
    return before if before is None else max(before, measured)


def _average(before: float | None, new: float | None) -> float | None:
    if new is None or not math.isfinite(new) or new <= 0:
        return before
    return new if before is None else before + SLOWLY * (new - before)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None
