"""The largest batch there may be: 50,000 lines, 200 MB. How much memory the API and the batch worker take for it, beside a small one.

python -m tests.batches.large [LINES] [BYTES]
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.redis_server import RedisServer
from tests.batches.running import Batching, batching, text_line

LINES, BYTES = 50_000, 200 * 2**20
SMALL = 200  # lines of the batch that shows what is taken anyway
INSTANT = (
    "engine.mock.prefill_base_ms=0", "engine.mock.prefill_token_ms=0", "engine.mock.decode_base_ms=0", "log.level=warning",
    "batches.part_s=20", "batches.lease_s=15",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that was taken, in bytes."""

    api: int
    worker: int


class Watch:
    """Looks at the memory of processes and of what they forked, ten times a second."""

    def __init__(self, api: int, worker: int) -> None:
        self._pids = {"api": api, "worker": worker}
        self._peaks = {"api": 0, "worker": 0}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._is_over.wait(0.1):
            for name, pid in self._pids.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    family = [process, *process.children(recursive=True)]
                    largest = max(one.memory_info().rss for one in family)
                    self._peaks[name] = max(self._peaks[name], largest)

    def end(self) -> Peak:
        """What was seen."""
        self._is_over.set()
        self._thread.join()
        return Peak(**self._peaks)


def padded_lines(lines: int, total_bytes: int) -> Iterator[bytes]:
    """Requests that fill a file of so many bytes."""
    for number in range(lines):
        line = json.dumps(text_line(str(number), prompt=[5, 6, 3 + number % 1000], max_tokens=1)).encode()
        size = (number + 1) * total_bytes // lines - number * total_bytes // lines
        yield line[:-1] + b" " * max(0, size - len(line) - 1) + b"}\n"


async def peak_of(it: Batching, worker_pid: int, lines: int, total_bytes: int) -> Peak:
    """The most memory that a batch took."""
    watch = Watch(it.served.api.pid, worker_pid)
    with tempfile.TemporaryFile() as file:
        for line in padded_lines(lines, total_bytes):
            file.write(line)
        file.seek(0)
        sent = await it.client.files.create(file=("in.jsonl", file), purpose="batch")
    made = await it.client.batches.create(input_file_id=sent.id, endpoint="/v1/completions", completion_window="24h")
    batch = await it.ended(made.id, limit_s=1500)
    assert batch.status == "completed", batch
    assert batch.request_counts.completed == lines
    return watch.end()


async def grown(server: RedisServer, folder: Path, lines: int, total_bytes: int) -> Peak:
    """How much more memory a large batch takes than a small one."""
    async with batching(server, folder, *INSTANT, workers=0) as it:
        worker = it.worker()
        await peak_of(it, worker.pid, SMALL, SMALL * 200)
        small = await peak_of(it, worker.pid, SMALL, SMALL * 200)
        large = await peak_of(it, worker.pid, lines, total_bytes)
        return Peak(large.api - small.api, large.worker - small.worker)


def main() -> None:
    """Run it once."""
    lines, total_bytes = (int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) > 2 else (LINES, BYTES)
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder, RedisServer.start(Path(folder)) as server:
        server.wait_ready()
        peak = asyncio.run(grown(server, Path(folder), lines, total_bytes))
    seconds = time.monotonic() - begin_s
    print(
        f"{lines} lines, {total_bytes >> 20} MiB: API +{peak.api >> 20} MiB, batch worker +{peak.worker >> 20} MiB, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
