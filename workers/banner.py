"""What a worker shows when it starts, in the manner that Celery's users know."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.wording import without_passwords
from workers.engine import EngineInfo

Rows = Sequence[tuple[str, str]]


def banner(
    name: str, pool: str, stage: str, *, redis_url: str, rows: Rows, lanes: Sequence[str], tasks: Sequence[str], version: str
) -> str:  # fmt: skip
    """The lines between start and `ready`; no password of an address is in them. `rows`: what runs the tasks."""
    rows = [("pool", pool), ("transport", without_passwords(redis_url)), *rows]
    lines = [f" -------------- {name} (baton {version})", "", "[config]"]
    lines += [f".> {label + ':':<13}{value}" for label, value in rows]
    lines += ["", "[queues]", *(f".> {stage}:{lane}" for lane in lanes)]
    lines += ["", "[tasks]", *(f"  . {task}" for task in tasks), ""]
    return "\n".join(lines)


def engine_rows(engine: EngineInfo, transfer: str) -> Rows:
    """Of a worker with an engine."""
    return [
        ("engine", f"{engine.name} ({engine.model}, {engine.num_blocks} blocks of {engine.block_size} tokens)"),
        ("transfer", transfer),
        ("concurrency", f"{engine.max_num_seqs} sequences"),
    ]


def embedding_rows(engine: EngineInfo) -> Rows:
    """Of a worker that makes embeddings."""
    return [
        ("engine", f"{engine.name} ({engine.model}, {engine.layout} numbers)"),
        ("concurrency", f"{engine.max_num_batched_tokens} tokens"),
    ]


def stage_rows(queue: str, concurrency: int) -> Rows:
    """Of a worker of a stage of one's own."""
    return [("queue", queue), ("concurrency", f"{concurrency} tasks")]
