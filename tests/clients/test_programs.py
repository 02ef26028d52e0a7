"""Programs as users write them, with each client and version that people use: they say themselves what they expect."""

from __future__ import annotations

import pytest

from tests.clients.environments import CLIENTS, PROGRAMS, RUNS
from tests.clients.running import run
from tests.serving import Served


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("program", "environment"), [(program, where) for program, wheres in RUNS.items() for where in wheres]
)
async def test_a_program_gets_what_it_expects(program: str, environment: str, served: Served) -> None:
    await run(program, environment, served.url)
    await served.system.until(served.rests, 10)


def test_every_program_is_run() -> None:
    found = {str(path.relative_to(PROGRAMS)) for path in (*PROGRAMS.glob("*.py"), *PROGRAMS.glob("js/*.mjs"))}
    assert found == set(RUNS)


@pytest.mark.parametrize("major", ["1", "2"])
def test_the_older_versions_are_those(major: str) -> None:
    folder = CLIENTS / f"openai-{major}"
    if not folder.exists():
        pytest.skip(f"{folder} is missing: `make test-surface` installs it")
    assert [path.name.split("-")[1].split(".")[0] for path in folder.glob("openai-*.dist-info")] == [major]
