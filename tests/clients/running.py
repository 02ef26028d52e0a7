"""Runs one program of `programs/` as its user would, against a server that runs."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile

import pytest

from tests.clients.environments import ENVIRONMENTS, PROGRAMS

LIMIT_S = 90


async def run(program: str, environment: str, url: str) -> None:
    """Fails with all that the program printed, unless it ends with 0 and in time; skips where its environment is not installed."""
    where = ENVIRONMENTS[environment]
    if not where.is_here:
        pytest.skip(f"{where.needs} is missing: `make test-surface` installs it")
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            where.interpreter, PROGRAMS / program,
            env=where.variables(url), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            ended = f"ended with {await _ending(process)}"
        except TimeoutError:
            ended = f"did not end within {LIMIT_S} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if ended != "ended with 0":
            output.seek(0)
            pytest.fail(f"{program} with {environment} {ended}:\n{output.read().decode()}", pytrace=False)


async def _ending(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(LIMIT_S):
        return await process.wait()
