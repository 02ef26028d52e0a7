"""What batches leave in the store of files, and a store that is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pipeline.batches.record import IDS
from pipeline.keys import files_folder
from pipeline.redis_server import RedisServer
from tests.batches.running import batching, text_line
from tests.object_store import object_store


async def test_a_part_that_nobody_knows_of_is_removed_while_a_worker_runs(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with batching(default_redis_server, tmp_path, "files.sweep_s=1") as it:
        batch = await it.ended((await it.batch([text_line("a")])).id)
        folder = await it.served.system.connection.command("GET", files_folder())
        orphans = [tmp_path / "files" / folder.decode() / f"{one}.0123" for one in (batch.id, IDS.new(1.0))]
        for orphan in orphans:
            orphan.write_bytes(b"x")
        await it.served.system.until(lambda: not any(orphan.exists() for orphan in orphans), 30)
        assert len(await it.lines(batch.output_file_id)) == 1


async def test_a_worker_starts_while_the_store_is_away(default_redis_server: RedisServer, tmp_path: Path) -> None:
    with object_store(tmp_path) as s3:
        settings = ("files.url=s3://not-there/x", f"files.storage_options={s3.options}")
        async with batching(default_redis_server, tmp_path, *settings, workers=0) as it:
            worker = it.worker()

            def said(words: str) -> bool:
                return any(words in path.read_text() for path in tmp_path.glob("workers-batch*.log"))

            await it.served.system.until(lambda: worker.poll() is not None or said("stays for now"), 60)
            await asyncio.sleep(0)
            assert worker.poll() is None
