"""What a worker shows when it starts, in the manner that Celery's users know."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from workers.engine import EngineInfo


def banner(
    name: str, pool: str, stage: str, *, redis_url: str, engine: EngineInfo, transfer: str, lanes: Sequence[str], version: str
) -> str:  # fmt: skip
    """The lines between start and `ready`; no password of an address is in them."""
    rows = [
        ("pool", pool),
        ("transport", _without_password(redis_url)),
        ("engine", f"{engine.name} ({engine.model}, {engine.num_blocks} blocks of {engine.block_size} tokens)"),
        ("transfer", transfer),
        ("stage", stage),
        ("concurrency", f"{engine.max_num_seqs} sequences"),
    ]
    lines = [f" -------------- {name} (baton {version})", "", "[config]"]
    lines += [f".> {label + ':':<13}{value}" for label, value in rows]
    lines += ["", "[queues]", *(f".> {stage}:{lane}" for lane in lanes), "", "[tasks]", f"  . {stage}", ""]
    return "\n".join(lines)


def _without_password(url: str) -> str:
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@") if password else url
