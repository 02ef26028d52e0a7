"""The README's Python, as somebody pastes it: into files of a folder in which a private Redis runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import RedisSettings
from pipeline.errors import RedisUnavailable
from pipeline.redis_server import RedisServer
from pipeline.settings_file import load_settings
from pipeline.tasks import connect

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 60


def python_of_the_readme() -> dict[str, str]:
    """The blocks that name their file in their first line, by that name."""
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    named = ((re.match(r"# (\w+\.py)", block), block) for block in blocks)
    return {name[1]: block for name, block in named if name}


def environment() -> dict[str, str]:
    """Nothing that says where Redis is; this copy of Baton."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return {**clean, "PYTHONPATH": str(REPOSITORY)}


def test_a_task_of_ones_own_and_its_client_run_as_they_stand(short_dir: Path) -> None:
    # Given the README's files in a folder, and what `make up` leaves there: a private Redis
    files = python_of_the_readme()
    assert list(files) == ["mystages.py", "client.py"]
    for name, text in files.items():
        (short_dir / name).write_text(text)
    with RedisServer.start(short_dir / RedisSettings().run_dir) as server:
        server.wait_ready()

        # When the worker of its comment and the client run there
        command = [sys.executable, "-m", "pipeline.cli", "worker", "embed", "--app", "mystages"]
        worker = subprocess.Popen(command, cwd=short_dir, env=environment(), stderr=subprocess.PIPE, text=True)
        try:
            assert worker.stderr is not None
            for line in worker.stderr:
                if "ready." in line:
                    break
            client = [sys.executable, "client.py"]
            result = subprocess.run(
                client, cwd=short_dir, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
            )
        finally:
            worker.terminate()
            worker.communicate(timeout=LIMIT_S)

    # Then it prints the result of the one call and the state of the other
    assert (result.stdout, result.stderr) == ("[18.0] PENDING\n", "")


async def test_without_any_redis_the_client_says_what_to_do(tmp_path: Path) -> None:
    settings = load_settings(None, {}, [f"redis.run_dir={tmp_path}"])
    with pytest.raises(
        RedisUnavailable, match=r"no Redis: redis.url is empty and .* is not there; start `baton up` here"
    ):
        async with connect(settings):
            pass
