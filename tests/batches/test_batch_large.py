"""Files of requests are never whole in memory (`python -m tests.batches.large` is the largest that may be)."""

from __future__ import annotations

from pathlib import Path

from pipeline.redis_server import RedisServer
from tests.batches.large import grown


async def test_a_batch_of_100_mb_takes_no_more_memory_than_64(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    peak = await grown(default_redis_server, tmp_path, lines=1000, total_bytes=100 * 2**20)
    assert max(peak.api, peak.worker) < 64 * 2**20
