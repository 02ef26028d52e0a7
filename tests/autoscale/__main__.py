"""`make scale-downs`: a run of `downs.py` on a Redis of its own, and its table. Exit status 1 where something is wrong."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from pathlib import Path

from pipeline.config import LogSettings
from pipeline.logs import configure
from pipeline.redis_server import RedisServer, find_server
from tests.autoscale.downs import run


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.autoscale")
    parser.add_argument("--downs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    configure(LogSettings(level="warning"), "test")
    folder = Path(tempfile.mkdtemp(prefix="downs-", dir="/tmp"))
    with RedisServer.start(folder, program=find_server()) as server:
        server.wait_ready()
        report = asyncio.run(
            run(server.url, folder, arguments.downs, arguments.seed, lambda line: print(line, flush=True))
        )
    for name, value in dataclasses.asdict(report).items():
        print(f"{name:<12} {value if not isinstance(value, float) else round(value, 1)}")
    if report.wrong:
        print(f"logs are in {folder}")
        sys.exit(1)


if __name__ == "__main__":
    main()
