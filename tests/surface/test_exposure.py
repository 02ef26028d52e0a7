"""A server that others reach does not start as long as nobody has said who may ask it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_up_says_so_before_it_starts_anything_but_redis(short_dir: Path) -> None:
    words = ["up", "--host", "0.0.0.0", "--port", "0", "--set", f"redis.run_dir={short_dir}"]
    started = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert started.returncode == 2
    assert "baton keys create" in started.stdout + started.stderr
    assert "starting the API" not in started.stdout


@pytest.mark.parametrize("module", ["api", "pipeline.cli"])
def test_a_server_for_others_does_not_start_without_a_key(default_redis_url: str, module: str) -> None:
    words = [sys.executable, "-m", module, *(["api"] if module != "api" else [])]
    sets = ["--set", f"redis.url={default_redis_url}", "--set", "api.host=0.0.0.0", "--set", "api.port=0"]
    started = subprocess.run([*words, *sets], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert started.returncode == 2
    assert "api.host is '0.0.0.0'" in started.stderr
    assert "baton keys create" in started.stderr
    assert "Traceback" not in started.stderr
