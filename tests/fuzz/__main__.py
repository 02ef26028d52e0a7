"""`python -m tests.fuzz --requests 10000 --seed 1`: one run; exit status 1 when something is wrong."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from pipeline.config import LogSettings
from pipeline.logs import configure
from pipeline.redis_server import RedisServer
from tests.fuzz.run import Plan, run

SHOWN = 40


def main() -> int:
    """Run, print the table and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Requests of all kinds; see README.md.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    arguments = parser.parse_args()
    configure(LogSettings(level="error"), "fuzz")
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    (folder / "logs").mkdir()
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began_s:6.1f}] {text}", file=sys.stderr, flush=True)

    with RedisServer.start(folder) as server:
        server.wait_ready()
        plan = Plan(arguments.requests, arguments.seed, arguments.clients)
        report = asyncio.run(run(plan, server, folder / "logs", say))
    for name, value in report.rows():
        print(f"{name + ':':<75} {value}")
    complaints = report.complaints()
    for complaint in complaints[:SHOWN]:
        print(f"\n{complaint}")
    if complaints:
        print(f"\n{len(complaints)} complaints; logs of all processes: {folder}/logs")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
