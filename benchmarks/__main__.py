"""`python -m benchmarks [NAME ...]`: runs the benchmarks, prints one table each and writes `benchmarks/results/bench.json`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.table import print_rows
from pipeline.config import LogSettings
from pipeline.logs import configure

NAMES = {
    "hops": "empty-pipeline hop times",
    "api": "the API half of a stream",
    "cancel": "how soon blocks are free when a client has gone (reference: the limit)",
    "recovery": "pause of streams whose worker was killed (reference: the lease)",
    "guarantees": "what fence and log cost (reference: without)",
    "system": "tokens per second and CPU a token",
    "engine": "torch engine beside Hugging Face generate",
    "sampling": "what grammars, penalties and log probabilities cost (reference: 1 ms, or without them)",
    "batches": "a batch alone (reference: a closed-loop client), live traffic beside one (reference: without); 20 minutes",
    "transfer": "transfer beside plain copies",
    "vllm": "torch engine beside vLLM",
}
NEEDS = {"vllm": "vllm"}  # packages that not every environment has


def main() -> None:
    """Run those named, or all; a benchmark that fails is named and the others run."""
    configure(LogSettings(level="warning"), "benchmark")
    wanted = sys.argv[1:] or [name for name in NAMES if find_spec(NEEDS.get(name, "pipeline"))]
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    results: dict[str, object] = {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    failed = []
    for name in wanted:
        try:
            rows = import_module(f"benchmarks.bench_{name}").run()
        except Exception as error:  # noqa: BLE001  # the others are still worth running; the exit status says it
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        results[name] = rows
        print_rows(rows, f"{name}: {NAMES[name]}")
    path = Path(__file__).parent / "results" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
