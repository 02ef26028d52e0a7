"""A batch under which everything dies: `python -m tests.batches.chaos --lines 5000 --seed 1`.

The batch worker, the process that it forked, a prefill worker, a decode worker and the API are killed at random moments, and started
again. Afterwards each line must have exactly one answer, the one that it would have had, the counts must agree, and nothing may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from pipeline.keys import BATCHES_ROOT
from pipeline.redis_server import RedisServer
from tests.batches.running import TEXTS, text_line
from tests.system import System

SETTINGS = (
    "batches.lease_s=3", "batches.part_s=2", "batches.part_lines=200", "worker.lease_s=3", "engine.mock.decode_base_ms=20",
    "engine.mock.max_num_seqs=16",
    "worker.max_attempts=50",
)  # fmt: skip
VICTIMS = ("batch worker", "horse", "prefill", "decode", "api")


@dataclasses.dataclass
class Report:
    """What a run found; all but `lines`, `kills` and `seconds` have to be 0."""

    seed: int
    lines: int
    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: int = 0
    twice: int = 0
    wrong: int = 0
    failed: int = 0
    counts: int = 0
    left: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether everything is as it has to be."""
        return not (self.missing or self.twice or self.wrong or self.failed or self.counts or self.left)


class Cast:
    """The processes of a run: kills one of a kind, and starts it again."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.url = ""
        self._of: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self) -> None:
        """One of each."""
        await asyncio.gather(*(self._start(role) for role in ("prefill", "decode", "batch worker", "api")))

    async def _start(self, role: str) -> None:
        if role == "api":
            self.url = await self._system.api()
            self._of[role] = next(p for p in reversed(self._system.processes) if "api" in p.args)  # type: ignore[operator]
        elif role == "batch worker":
            self._of[role] = self._system.spawn("workers", "batch")
        else:
            self._of[role] = await self._system.worker(role)

    async def kill(self, victim: str) -> bool:
        """`kill -9`; False where there is none now."""
        if victim == "horse":
            with contextlib.suppress(psutil.NoSuchProcess):
                forked = sorted(psutil.Process(self._of["batch worker"].pid).children(), key=psutil.Process.create_time)
                for horse in forked[1:]:  # the first one tells of ends
                    horse.kill()
                    return True
            return False
        self._of[victim].kill()
        await asyncio.to_thread(self._of[victim].wait)
        await self._start(victim)
        return True


async def run(server: RedisServer, folder: Path, *, lines: int, seed: int, kills: int) -> Report:
    """One run."""
    rng, report = random.Random(seed), Report(seed, lines)
    begin_s = time.monotonic()
    server.command("FLUSHALL")
    async with System(server.url, *SETTINGS, log_dir=folder) as system:
        cast = Cast(system)
        await cast.start()
        data = b"".join(json.dumps(_line(number)).encode() + b"\n" for number in range(lines))
        batch_id = await _made(cast, data)
        worse = asyncio.create_task(_disturb(cast, rng, report, kills))
        try:
            batch = await _ended(cast, batch_id)
        finally:
            worse.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worse
        await _judge(cast, system, batch, report)
    report.seconds = round(time.monotonic() - begin_s, 1)
    return report


def _line(number: int) -> dict[str, Any]:
    return text_line(
        str(number), prompt=[3 + number % 1000, 4 + number // 1000, 7], max_tokens=2 + number % 7, seed=number
    )


async def _disturb(cast: Cast, rng: random.Random, report: Report, kills: int) -> None:
    """Each kind dies at least once, whatever the seed says."""
    order = [VICTIMS[at % len(VICTIMS)] for at in range(kills)]
    rng.shuffle(order)
    for victim in order:
        await asyncio.sleep(rng.uniform(0.2, 2.5))
        for _ in range(100):  # there may be no horse just now
            if await cast.kill(victim):
                break
            await asyncio.sleep(0.1)
        report.kills[victim] = report.kills.get(victim, 0) + 1


async def _made(cast: Cast, data: bytes) -> str:
    async with openai.AsyncOpenAI(base_url=f"{cast.url}/v1", api_key="none") as client:
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=TEXTS, completion_window="24h")
        return batch.id


async def _ended(cast: Cast, batch_id: str) -> dict[str, Any]:
    """The batch at its end, asked of whichever API there is."""
    async with asyncio.timeout(600), httpx.AsyncClient(timeout=10) as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await http.get(f"{cast.url}/v1/batches/{batch_id}")
                if answer.status_code == 200 and (batch := answer.json())["status"] in (
                    "completed", "failed", "expired", "cancelled",
                ):  # fmt: skip
                    found: dict[str, Any] = batch
                    return found
            await asyncio.sleep(0.2)


async def _judge(cast: Cast, system: System, batch: dict[str, Any], report: Report) -> None:
    results: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=cast.url, timeout=60) as http:
        for name in ("output_file_id", "error_file_id"):
            if name in batch:
                content = (await http.get(f"/v1/files/{batch[name]}/content")).content
                results += [json.loads(line) for line in content.splitlines()]
        files = (await http.get("/v1/files")).json()["data"]
    seen = Counter(result["custom_id"] for result in results)
    report.missing = sum(str(number) not in seen for number in range(report.lines))
    report.twice = sum(count - 1 for count in seen.values())
    report.failed = sum(result["response"] is None or result["response"]["status_code"] != 200 for result in results)
    report.wrong = sum(not _is_right(result) for result in results)
    counts = batch["request_counts"]
    expected = {"total": report.lines, "completed": report.lines, "failed": 0}
    report.counts = int(counts != expected or batch["status"] != "completed")
    await system.until(system.rests, 30)
    give_up_s = time.monotonic() + 20
    while True:  # a worker that was killed at the very end is followed by one that tidies up
        report.left = await _left(system, batch, files)
        if not report.left or time.monotonic() > give_up_s:
            return
        await asyncio.sleep(0.5)


def _is_right(result: dict[str, Any]) -> bool:
    if result["response"] is None or result["response"]["status_code"] != 200:
        return True  # counted as failed
    number, body = int(result["custom_id"]), result["response"]["body"]
    return bool(body["usage"]["completion_tokens"] == 2 + number % 7 and body["usage"]["prompt_tokens"] == 3)


async def _left(system: System, batch: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any]:
    """What should not be there: keys of the batch's work, objects that no file names, files beside input and output."""
    left: dict[str, Any] = await system.at_rest()
    for kind in ("lease:*", "done:*", "parts:*", "spent:*", "untidy", "open"):
        pattern = BATCHES_ROOT + kind
        if keys := await system.connection.command("KEYS", pattern):
            left[pattern] = keys
    if await system.connection.command("KEYS", system.keys.root + "idem:*"):
        left["idem"] = len(await system.connection.command("KEYS", system.keys.root + "idem:*"))
    expected = {batch["input_file_id"], batch.get("output_file_id"), batch.get("error_file_id")} - {None}
    if (extra := {file["id"] for file in files} - expected) or len(files) != len(expected):
        left["files"] = sorted(extra)
    root = Path(system.settings.files.url)
    objects = {path.name for path in root.rglob("*") if path.is_file()}
    if odd := objects - expected:
        left["objects"] = sorted(odd)
    return left


def main() -> int:
    """Run as often as asked, print a row each. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.batches.chaos")
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kills", type=int, default=15)
    arguments = parser.parse_args()
    clean = True
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        with (
            tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp") as folder,
            RedisServer.start(Path(folder)) as server,
        ):
            server.wait_ready()
            report = asyncio.run(run(server, Path(folder), lines=arguments.lines, seed=seed, kills=arguments.kills))
        print(json.dumps(dataclasses.asdict(report)), flush=True)
        clean = clean and report.is_clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
