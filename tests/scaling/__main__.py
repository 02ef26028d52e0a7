"""`python -m tests.scaling`: the properties on many seeds, then the comparison; exit status 1 when a property is broken."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.scaling.compare import HOUR_S, compare, rows
from tests.scaling.properties import all_violations
from tests.scaling.simulator import Machines

SHOWN = 20


def main() -> int:
    """Check, compare, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.scaling", description="decide() on traces; see pipeline/scaling/README.md."
    )
    parser.add_argument("--seeds", type=int, default=1000, help="of 10 minutes, for the properties")
    parser.add_argument("--compared", type=int, default=20, help="seeds of each shape for the table; 0: no table")
    parser.add_argument("--hours", type=float, default=2.0, help="length of a trace of the table")
    parser.add_argument(
        "--start", type=float, default=Machines().start_s, help="seconds that a worker takes to start, for the table"
    )
    arguments = parser.parse_args()
    processes = os.cpu_count() or 1
    began_s = time.monotonic()
    wrong = all_violations(range(arguments.seeds), processes)
    print(f"{arguments.seeds} seeds, {len(wrong)} violations, {time.monotonic() - began_s:.0f} s")
    print(*wrong[:SHOWN], sep="\n", end="\n" if wrong else "")
    if arguments.compared:
        table = compare(arguments.compared, arguments.hours * HOUR_S, Machines(start_s=arguments.start), processes)
        print(
            f"{arguments.compared} seeds of {arguments.hours:g} h each: requests in SLO · worker-hours beside fixed peak provisioning"
        )
        print(*rows(table), sep="\n")
        print(f"{time.monotonic() - began_s:.0f} s in all")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
