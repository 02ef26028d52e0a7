"""The numbers of a look as programs read them: those that are not known, or not believed, are left out or null."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.queue import STAGES
from pipeline.scaling.signals import Number, PoolSignals, believed

OF_STAGE = ("alive", "running", "blocks_used", "blocks_total", "served_per_s", "predicted_wait_s")
OF_LANE = ("waiting", "prompt_tokens", "oldest_s", "arrivals_per_s", "prompt_tokens_per_s")
OF_SPEEDS = ("prompt_token_s", "inter_token_s", "answer_tokens", "blocks_per_sequence", "sequences_per_worker")


def numbers(of: object, names: Sequence[str]) -> dict[str, Number]:
    """These numbers of something, None for those that nobody knows."""
    return {name: _believed(getattr(of, name)) for name in names}


def known(signals: PoolSignals) -> list[tuple[str, str, str, float]]:
    """What is known of all stages: stage, lane ('' of the whole stage), name, value."""
    rows = []
    for stage in STAGES:
        said = signals.stage(stage)
        parts = {"": numbers(said, OF_STAGE), **{lane: numbers(one, OF_LANE) for lane, one in said.lanes.items()}}
        rows += [
            (stage, lane, name, float(value))
            for lane, part in parts.items()
            for name, value in part.items()
            if value is not None
        ]
    return rows


def _believed(value: Number) -> Number:
    if value is None or not believed(value):
        return None
    return value if isinstance(value, int) else round(value, 6)
