"""Signals made of readings: rates between two of them, and speeds as they are measured, which outlive the workers they were measured on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping

from pipeline.queue import LANES, STAGES
from pipeline.said import WorkerSaid
from pipeline.scaling.reading import Reading, StageReading
from pipeline.scaling.signals import UNPROMISED, LaneSignals, PoolSignals, Speeds, StageSignals

SLOWLY = 0.2  # of what is new, a look at workers that worked since the last one
ANSWERS = 50  # answers, of whose lengths the moving average is one
MOST_OF_BLOCKS = 0.85  # of a worker's blocks: what is above preempts


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What is kept from look to look. `last`: the reading before."""

    last: Reading | None = None
    speeds: Speeds = dataclasses.field(default_factory=Speeds)


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
    speeds = _speeds(now, known, itl_s)
    seconds = _seconds(now, known.last)
    stages = {stage: _stage(stage, now, known.last, seconds, fleet) for stage in STAGES}
    waits = _waits(now, stages, speeds)
    stages = {name: dataclasses.replace(stage, predicted_wait_s=waits[name]) for name, stage in stages.items()}
    promised = [lane for lane in LANES if lane not in UNPROMISED]
    has_prefill = bool(now.stages["prefill"].workers)
    signals = PoolSignals(
        clock_ms=now.time_ms,
        local_prompt_tokens_per_s=_rate(now, known.last, seconds, *(("local", lane) for lane in promised)),
        local_prompt_tokens=0 if has_prefill else sum(now.count("tokens", "decode", lane) for lane in promised),
        prefill=stages["prefill"], decode=stages["decode"], speeds=speeds,
    )  # fmt: skip
    return signals, Known(now, speeds)


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
        waiting=now.count("waiting", stage, lane), prompt_tokens=now.count("tokens", stage, lane),
        oldest_s=(now.time_ms - came_ms) / 1000 if came_ms else 0.0,
        arrivals_per_s=_rate(now, last, seconds, ("arrived", stage, lane)),
        prompt_tokens_per_s=_rate(now, last, seconds, ("arrived_tokens", stage, lane)),
    )  # fmt: skip


def _waits(now: Reading, stages: Mapping[str, StageSignals], speeds: Speeds) -> dict[str, float | None]:
    """How long a task that comes now waits: by its stage's speed, among workers that there are."""
    tokens = sum(now.count("tokens", "prefill", lane) for lane in LANES)
    tasks = sum(now.count("waiting", "decode", lane) for lane in LANES)
    token_s, alive, served = speeds.prompt_token_s, stages["prefill"].alive, stages["decode"].served_per_s
    return {
        "prefill": tokens * token_s / alive if token_s is not None and alive else None,
        "decode": 0.0 if not tasks else tasks / served if served else None,
    }


# -- speeds -----------------------------------------------------------------------------------------------------------


def _speeds(now: Reading, known: Known, itl_s: float) -> Speeds:
    """Moving averages; what nobody measures now stays as it was."""
    before, last = known.speeds, known.last or Reading()
    prefill, decode = now.stages["prefill"], now.stages["decode"]
    busy = [said for said in decode.workers.values() if said.stats.running]
    running = sum(said.stats.running for said in busy)
    inter_token_s = _average(before.inter_token_s, _mean(said.stats.step_ms / 1000 for said in busy))
    blocks = _average(before.blocks_per_sequence, _ratio(sum(said.stats.blocks_used for said in busy), running))
    return Speeds(
        prompt_token_s=_average(before.prompt_token_s, _token_s(prefill, last.stages.get("prefill", StageReading()))),
        inter_token_s=inter_token_s,
        answer_tokens=_answer_tokens(now, known.last, before.answer_tokens),
        blocks_per_sequence=blocks,
        sequences_per_worker=_sequences(decode, blocks, inter_token_s, _mean(said.stats.running for said in busy), itl_s)
        or before.sequences_per_worker,
    )  # fmt: skip


def _token_s(now: StageReading, before: StageReading) -> float | None:
    """Seconds that a worker was busy for each prompt token that it computed since the reading before."""
    busy_s, tokens = 0.0, 0
    for name, said in now.workers.items():
        old = before.workers.get(name, WorkerSaid()).stats
        if said.stats.steps > old.steps and said.stats.prompt_tokens_computed > old.prompt_tokens_computed:
            busy_s += (said.stats.steps - old.steps) * said.stats.step_ms / 1000
            tokens += said.stats.prompt_tokens_computed - old.prompt_tokens_computed
    return _ratio(busy_s, tokens)


def _answer_tokens(now: Reading, last: Reading | None, before: float | None) -> float | None:
    """Tokens of an answer: an average of about the last ANSWERS ones."""
    old = last or Reading()
    answers = now.count("ended", "done") - old.count("ended", "done")
    tokens = now.count("answered") - old.count("answered")
    if answers <= 0 or tokens < 0:
        return before
    return tokens / answers if before is None else before + (tokens / answers - before) * min(1.0, answers / ANSWERS)


def _sequences(
    decode: StageReading, blocks: float | None, inter_token_s: float | None, running: float | None, itl_s: float
) -> float | None:  # fmt: skip
    """Sequences that a worker runs while the promise holds: its slots, less where its blocks or its speed allow fewer."""
    most = _mean(said.engine.max_num_seqs for said in decode.workers.values())
    if most is None:
        return None
    if blocks:
        room = _mean(said.engine.num_blocks for said in decode.workers.values()) or 0.0
        most = min(most, MOST_OF_BLOCKS * room / blocks)
    if inter_token_s and running and inter_token_s > itl_s:
        most = min(most, running * itl_s / inter_token_s)
    return max(1.0, most)


def _average(before: float | None, new: float | None) -> float | None:
    if new is None or not math.isfinite(new) or new <= 0:
        return before
    return new if before is None else before + SLOWLY * (new - before)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None
