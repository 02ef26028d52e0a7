"""Seeded runs of the chaos suite; README.md says what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> None:
    """A run in a process of its own: it owns its event loop, its children and its logs."""
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0


@pytest.mark.timeout(400)
def test_nothing_is_lost_while_every_window_is_hit_once() -> None:
    run("--seconds", "10", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["mock", "torch"])
def test_nothing_is_lost_in_two_minutes(engine: str) -> None:
    run("--seconds", "120", "--seed", "2", "--engine", engine)
