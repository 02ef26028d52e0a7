"""A short run of `python -m tests.batches.chaos`; `make batch-chaos` is the full one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.redis_server import RedisServer
from tests.batches.chaos import VICTIMS, run


@pytest.mark.faults
async def test_each_line_has_one_answer_whatever_dies(default_redis_server: RedisServer, tmp_path: Path) -> None:
    report = await run(default_redis_server, tmp_path, lines=1500, seed=7, kills=len(VICTIMS))
    assert report.is_clean, report
    assert sum(report.kills.values()) > 2
