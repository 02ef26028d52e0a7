"""`python -m tests.chaos --seconds 60 --seed 1 --engine mock`: one run; exit status 1 when an invariant is broken."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from pipeline.config import LogSettings
from pipeline.logs import configure
from tests.chaos.fleet import ENGINES
from tests.chaos.run import Plan, run


def main() -> int:
    """Run, print the table, say how to run it again."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults under load; see README.md.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long harm is done, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="mock")
    parser.add_argument("--clients", type=int, default=12, help="requests in flight")
    parser.add_argument("--no-power-cuts", action="store_true", help="Redis never loses its last second")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    arguments = parser.parse_args()
    configure(LogSettings(level="error"), "chaos")
    plan = Plan(arguments.seconds, arguments.seed, arguments.engine, arguments.clients, not arguments.no_power_cuts)
    began_s = time.monotonic()
    report, logs = asyncio.run(
        run(plan, lambda text: print(f"[{time.monotonic() - began_s:6.1f}] {text}", file=sys.stderr, flush=True))
    )
    print(report.table())
    if arguments.out:
        arguments.out.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    print(f"\nrun again: {report.again}")
    if report.is_good:
        return 0
    print(f"\n{report.complaints()}\n\nlogs of all processes: {logs}/logs")
    return 1


if __name__ == "__main__":
    sys.exit(main())
