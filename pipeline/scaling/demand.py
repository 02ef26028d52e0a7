"""How many workers hold the promises: formulas of measured speeds and of what comes and waits.

Prefill is a queue of one server a worker: the fewest servers with which few prompts wait longer than the promise leaves (M/M/c: the
chance to wait by Sakasegawa's approximation, an exponential tail behind it).
Decode is Little's law: sequences that run at once, as many to a worker as keep the inter-token promise, and room for what chance adds to
them (square-root staffing: Halfin and Whitt, 1981).
"""

from __future__ import annotations

import dataclasses
import math

from pipeline.config import AutoscaleSettings
from pipeline.scaling.forecast import Outlook
from pipeline.scaling.signals import PoolSignals, number

LATE = 0.03  # of the prompts that may wait longer than promised, where chance alone decides
OF_TTFT = 0.5  # of the promise is left for waiting at least, however long prompts take
BLOCKS_FULL = 0.85  # of a decode worker's blocks: what is above preempts
SPARE = 1.5  # standard deviations of the running sequences that decode has room for
SLOW = 1.05  # times the promise between two tokens: what is measured is noisy
MOST = 100_000  # workers


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Workers that hold the promises: for what comes (`flow`), and with what already waits (`workers`, never fewer)."""

    flow: int
    workers: int
    why: str = ""


def prefill_need(signals: PoolSignals, outlook: Outlook, policy: AutoscaleSettings, start_s: float) -> Need:
    """Workers for the prompt tokens that come and wait, those that decode computes for want of a prefill worker included."""
    token_s, alive = number(signals.speeds.prompt_token_s), number(signals.prefill.alive)
    load = outlook.prompt_tokens_per_s * token_s
    prompt_s = load / outlook.requests_per_s if outlook.requests_per_s else 0.0
    slack_s = max(policy.ttft_s - prompt_s, policy.ttft_s * OF_TTFT)
    late_s = max(slack_s, start_s)  # who is started now finds what has piled up by then, and works it off in as long
    now_load = outlook.now_per_s * prompt_s
    piling = max(0.0, now_load - alive) * start_s / late_s
    flow = max(servers(load, prompt_s, slack_s, policy.utilization), _ceil(now_load + piling))
    waiting = signals.prefill.promised("prompt_tokens") + number(signals.local_prompt_tokens)
    work_s = waiting * token_s
    backlog = now_load + work_s / late_s if work_s > slack_s * max(1.0, alive) else 0.0
    queue_s, oldest_s = work_s / max(1.0, alive), signals.prefill.oldest_s
    is_late = oldest_s > policy.ttft_s and number(signals.prefill.running) >= alive > 0
    coming = f"{outlook.prompt_tokens_per_s:,.0f} prompt tokens/s keep {load:.1f} workers busy"
    return _largest(
        Need(flow, flow, coming + _because(outlook)),
        Need(
            flow,
            _ceil(backlog),
            f"{waiting:,.0f} prompt tokens wait {max(oldest_s, queue_s):.1f} s, promised {policy.ttft_s:.1f} s",
        ),
        Need(
            flow,
            _ceil(alive + 1) if is_late else 0,
            f"all are busy and a prompt waits {oldest_s:.1f} s, promised {policy.ttft_s:.1f} s",
        ),
    )


def decode_need(signals: PoolSignals, outlook: Outlook, policy: AutoscaleSettings, start_s: float) -> Need:
    """Workers for the sequences that will run at once by Little's law, and for those that run and wait now."""
    seats, alive = max(1.0, number(signals.speeds.sequences_per_worker)), number(signals.decode.alive)
    answer_s = number(signals.speeds.answer_tokens) * policy.itl_ms / 1000
    coming, now_coming = outlook.requests_per_s * answer_s, outlook.now_per_s * answer_s
    piling = max(0.0, now_coming - alive * seats)
    with_spare = coming + SPARE * math.sqrt(coming)
    flow = _seated(max(with_spare, now_coming + piling), seats, signals)
    waiting = signals.decode.promised("waiting")
    present = number(signals.decode.running) + waiting
    held = _seated(present, seats, signals) if waiting else 0
    is_all_busy = number(signals.decode.running) >= max(1.0, alive)  # else the speed is one of the past
    is_slow = is_all_busy and number(signals.speeds.inter_token_s) * 1000 > policy.itl_ms * SLOW
    coming_why = f"{coming:,.0f} sequences at once ({outlook.requests_per_s:.1f} requests/s of {answer_s:.1f} s)"
    return _largest(
        Need(flow, flow, coming_why + _because(outlook)),
        Need(flow, held, f"{present:,.0f} sequences run and wait, {seats:.0f} a worker hold {policy.itl_ms:g} ms"),
        Need(
            flow,
            _ceil(alive + 1) if is_slow else 0,
            f"tokens come slower than one each {policy.itl_ms:g} ms, as promised",
        ),
    )


def _largest(*needs: Need) -> Need:
    return max(needs, key=lambda need: need.workers)  # the first of equals


def servers(load: float, service_s: float, slack_s: float, utilization: float) -> int:
    """The fewest servers for `load` busy ones such that no more than `LATE` of the tasks wait longer than `slack_s`."""
    if load <= 0 or service_s <= 0:
        return 0
    count = max(1, _ceil(load / utilization))
    while count < MOST and late_share(load, count, service_s, slack_s) > LATE:
        count += 1
    return count


def late_share(load: float, count: int, service_s: float, slack_s: float) -> float:
    """The share of tasks that wait longer than `slack_s` for one of `count` servers."""
    busy = load / count
    if busy >= 1:
        return 1.0
    waits = busy ** (math.sqrt(2 * (count + 1)) - 1)
    return float(waits * math.exp(-(1 - busy) * count * slack_s / service_s))


def _seated(sequences: float, seats: float, signals: PoolSignals) -> int:
    """Workers that so many sequences take: by their seats, or by their blocks where those are scarcer."""
    blocks, alive = number(signals.speeds.blocks_per_sequence), number(signals.decode.alive)
    room = number(signals.decode.blocks_total) / alive * BLOCKS_FULL if alive else 0.0
    return _ceil(max(sequences / seats, sequences * blocks / room if room else 0.0))


def _because(outlook: Outlook) -> str:
    return f": {outlook.why}" if outlook.why else ""


def _ceil(workers: float) -> int:
    return MOST if workers >= MOST else math.ceil(workers - 1e-9)
