"""The GPU benchmark as a dry run: a tiny model on this machine's CPU, every configuration, a few requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm]
ROOT = Path(__file__).parents[2]
SMALL = [
    "--model", "tiny", "--device", "cpu", "--num-seqs", "32", "--rates", "3+1", "--seconds", "2", "--sizes", "64,256",
    "--repeats", "2", "--start-s", "200",
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "configuration",
    [
        "disagg --transfer shm --max-local 0,128",
        pytest.param("aggregated", marks=pytest.mark.slow),
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("handover --transfer tcp", marks=pytest.mark.slow),
    ],
)
def test_a_configuration_is_measured(configuration: str, tmp_path: Path) -> None:
    words = [*configuration.split(), *SMALL, "--out", str(tmp_path / "out"), "--logs", str(tmp_path / "logs")]
    command = [sys.executable, "-m", "benchmarks.gpu_disagg", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())
    for rate in found["rates"]:
        assert rate["requests"] == rate["whole"] > 0
        assert rate["failed"] == []
    if configuration.startswith("disagg"):
        assert [rate["max_local"] for rate in found["rates"]] == [0, 128]
        remote, mixed = found["rates"]
        assert remote["fetched"]["shm"]["handles"] == remote["requests"]
        assert mixed["fetched"].get("shm", {}).get("handles", 0) == mixed["kinds"].get("long", {}).get("requests", 0)
        assert all(row["fetched"]["shm"]["nbytes"] == 2 * row["nbytes"] for row in found["handovers"])
