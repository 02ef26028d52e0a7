"""The GPU benchmark runs where nothing can be installed: all that it imports, and what it starts imports, is in a list."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("api", "pipeline", "workers", "benchmarks")
STARTED = (
    "benchmarks.gpu_disagg", "benchmarks.gpu.vllm_server", "api.__main__", "workers.__main__", "workers.child",
    "workers.engines.vllm.engine",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Our modules and their files."""
    paths = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(path: Path) -> Iterator[str]:
    """What a file imports, anywhere in it; a text that names a module counts, since engines and ways are loaded by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.Constant(value=str(text)) if text.startswith("workers."):
                yield text


def reached(names: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Our modules that are reached from these, and the packages of others."""
    known, seen, foreign = modules(), set[str](), set[str]()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        for found in imported(known[name]):
            top = found.partition(".")[0]
            if top not in OURS:
                foreign.add(top)
                continue
            parts = found.split(".")
            waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return seen, foreign


def listed() -> set[str]:
    lines = (ROOT / "benchmarks" / "gpu_packages.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_what_the_gpu_benchmark_starts_needs_only_what_is_listed() -> None:
    seen, foreign = reached(STARTED)
    missing = {name.lower().replace("_", "-") for name in foreign - set(sys.stdlib_module_names)} - listed()
    assert not missing
    assert {"api.generation", "workers.transfers.ways.shm", "workers.engines.vllm.load", "benchmarks.gpu.merge"} <= seen
    assert not {name for name in seen if name.startswith("pipeline.cli.")}


def test_a_package_that_is_not_listed_would_be_noticed() -> None:
    _, foreign = reached(("benchmarks.table", "api.app"))
    assert {"rich", "fastapi"} <= foreign
    assert "pytest" not in listed()
