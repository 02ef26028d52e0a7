"""What tells Baton's logits processor (`sampling.py`) how a request samples; apart from it, for that module needs vLLM."""

from __future__ import annotations

import msgspec

from pipeline.protocol import SamplingOptions

KEY = "baton"  # in `SamplingParams.extra_args`


class Keyed(msgspec.Struct, frozen=True, kw_only=True):
    """What travels with a request: how it samples, which choice it is, and the tokens that it had before it came here."""

    options: SamplingOptions
    choice: int
    done: list[int] = []


def is_keyed(options: SamplingOptions) -> bool:
    """Whether the tokens of such a request are a function of its seed."""
    return options.temperature > 0 and options.seed is not None


def needs_processor(options: SamplingOptions) -> bool:
    """Whether a request with these options is for this processor."""
    return is_keyed(options) or options.presence_penalty != 0 or options.frequency_penalty != 0
