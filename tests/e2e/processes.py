"""Processes of a worker, as the kernel knows them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the children: a worker's engine."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]
