"""Traffic by seed: when requests come, how long their prompts and answers are."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

PROMPT_TOKENS, PROMPT_SPREAD = 800, 0.6  # mean and sigma of a log-normal
ANSWER_TOKENS, ANSWER_SPREAD = 250, 0.6

Rate = Callable[[float], float]  # requests a second, at a second


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    name: str
    seed: int
    length_s: float
    peak_per_s: float  # the highest rate that it was made of: what fixed provisioning is made for
    arrivals: list[Arrival]


def steady(random: random.Random, length_s: float) -> Rate:
    level = random.uniform(2, 8)
    return lambda at_s: level


def ramp(random: random.Random, length_s: float) -> Rate:
    """Up over a third of the time, stays, and down again."""
    low, high = random.uniform(0.5, 2), random.uniform(6, 10)
    third = length_s / 3
    return lambda at_s: low + (high - low) * max(0.0, min(at_s / third, 1.0, (length_s - at_s) / third))


def burst(random: random.Random, length_s: float) -> Rate:
    """A low level, and bursts of two to four times as much, a few minutes long."""
    low = random.uniform(1.5, 3)
    bursts, at_s = [], random.uniform(60, 300)
    while at_s < length_s:
        bursts.append((at_s, at_s + random.uniform(90, 300), low * random.uniform(2, 4)))
        at_s = bursts[-1][1] + random.uniform(240, 900)
    return lambda at_s: next((rate for begins, ends, rate in bursts if begins <= at_s < ends), low)


def diurnal(random: random.Random, length_s: float) -> Rate:
    """A day in an hour: a sine from nearly nothing to a peak."""
    low, high, phase = random.uniform(0.2, 1), random.uniform(6, 10), random.uniform(0, 2 * math.pi)
    return lambda at_s: low + (high - low) * (1 - math.cos(2 * math.pi * at_s / 3600 + phase)) / 2


def silence(random: random.Random, length_s: float) -> Rate:
    """Traffic for a sixth of the time, then none."""
    level, ends = random.uniform(1, 4), length_s / 6
    return lambda at_s: level if at_s < ends else 0.0


def flash_crowd(random: random.Random, length_s: float) -> Rate:
    """Some traffic, half of the time nothing, then at once a crowd that goes away slowly."""
    low, high = random.uniform(0.5, 2), random.uniform(5, 9)
    quiet, comes = length_s / 8, length_s * 5 / 8

    def rate(at_s: float) -> float:
        if at_s < comes:
            return low if at_s < quiet else 0.0
        return low + (high - low) * math.exp(-max(0.0, at_s - comes - length_s / 8) / (length_s / 8))

    return rate


SHAPES = {
    "steady": steady, "ramp": ramp, "burst": burst, "diurnal": diurnal, "silence": silence, "flash crowd": flash_crowd
}  # fmt: skip


def make(name: str, seed: int, length_s: float) -> Trace:
    """The trace of a shape and a seed: Poisson arrivals at its rate."""
    chance = random.Random(f"{name}:{seed}")
    rate = SHAPES[name](chance, length_s)
    peak = max(rate(float(at_s)) for at_s in range(int(length_s)))
    arrivals, at_s = [], 0.0
    while (at_s := at_s + chance.expovariate(peak)) < length_s:
        if chance.random() * peak < rate(at_s):
            prompt = _tokens(chance, PROMPT_TOKENS, PROMPT_SPREAD, 8000)
            arrivals.append(Arrival(at_s, prompt, _tokens(chance, ANSWER_TOKENS, ANSWER_SPREAD, 2000)))
    return Trace(name, seed, length_s, peak, arrivals)


def _tokens(chance: random.Random, mean: float, spread: float, most: int) -> int:
    return min(most, max(2, round(chance.lognormvariate(math.log(mean) - spread**2 / 2, spread))))
