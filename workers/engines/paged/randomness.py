"""Random numbers without state: each is a function of (seed, choice, index), so a resumed sample goes on unchanged.

splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) as a keyed hash.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.engines.paged.runner import Draw

Bits = NDArray[np.uint64]
MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(value: Bits) -> Bits:
    """splitmix64's step and finalizer on each element: a permutation of the 64-bit numbers."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))


def bits(draws: Sequence[Draw]) -> Bits:
    """64 random bits for each draw; those without a seed come from the operating system."""
    seeds = np.array([(draw.options.seed or 0) & MASK for draw in draws], dtype=np.uint64)
    choices = np.array([draw.choice for draw in draws], dtype=np.uint64)
    indices = np.array([draw.index for draw in draws], dtype=np.uint64)
    keyed = mix(mix(mix(seeds) ^ choices) ^ indices)
    unseeded = np.array([draw.options.seed is None for draw in draws])
    if unseeded.any():
        entropy = np.frombuffer(os.urandom(8 * len(draws)), dtype=np.uint64)
        keyed = np.where(unseeded, entropy, keyed)
    return keyed


def uniforms(draws: Sequence[Draw]) -> NDArray[np.float64]:
    """A number in [0, 1) of 53 random bits for each draw."""
    return (bits(draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53
