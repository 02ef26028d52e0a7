"""Workers and APIs of the version before and of this one serve the same pool, as they do while a roll-out goes on.

The version before is the last tag `v*`, or where there is none the commit named in `previous_version.txt`.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import events_of
from tests.system import POOL, System, collect, request

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).parents[2]
SETTINGS = ("worker.lease_s=2", "engine.mock.decode_base_ms=10")


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, check=True).stdout


def previous_version() -> str:
    tags = git("tag", "--list", "v*", "--merged", "HEAD", "--sort=-version:refname").decode().split()
    return tags[0] if tags else (Path(__file__).parent / "previous_version.txt").read_text().strip()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of the version before."""
    folder = tmp_path_factory.mktemp("before")
    try:
        archive = git("archive", previous_version())
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"the history that holds the version before is not here: {error}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    yield folder


@pytest.mark.parametrize("old", ["prefill", "decode", "prefill decode"])
async def test_workers_of_the_version_before_serve_clients_of_this_one(
    old: str, before: Path, default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        for stage in ("prefill", "decode"):
            await system.worker(stage, code=before if stage in old else None)
        items = [request(20 + i, n=1 + i % 2, max_tokens=30) for i in range(6)]
        streams = [await client.submit(item) for item in items]
        answers = await asyncio.gather(
            *(collect(stream, item.input.sampling_options.n) for stream, item in zip(streams, items, strict=True))
        )
        for tokens, ended in answers:
            assert (ended.state, {len(choice) for choice in tokens}) == ("done", {30})
        await system.until(system.rests, 10)


async def test_a_worker_of_this_version_goes_on_where_one_of_the_version_before_died(
    before: Path, default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system, system.client() as client:
        await system.worker("prefill", code=before)
        doomed = await system.worker("decode", code=before)
        expected, _ = await collect(await client.submit(request(40, max_tokens=100)))
        item = request(40, max_tokens=100)
        reading = asyncio.create_task(collect(await client.submit(item)))
        await system.until(lambda: system.logged(item.id, 10), 20)
        await system.worker("decode")
        doomed.kill()
        tokens, ended = await reading
        assert (ended.state, tokens) == ("done", expected)
        await system.until(system.rests, 10)


async def test_an_api_of_the_version_before_is_served_by_workers_of_this_one(
    before: Path, default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, *SETTINGS, log_dir=tmp_path) as system:
        urls = [await system.api(code=code) for code in (before, None)]
        for stage in ("prefill", "decode"):
            await system.worker(stage)
        body = {"model": POOL, "prompt": "Once upon a time", "max_tokens": 30, "stream": True, "temperature": 0}
        async with httpx.AsyncClient(timeout=60) as http:
            answers = []
            for url in urls:
                async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
                    data = await events_of(response)
                    assert (response.status_code, data.endswith(b"data: [DONE]\n\n")) == (200, True)
                    answers.append(texts(data))
            assert answers[0] == answers[1]
        await system.until(system.rests, 10)


def texts(data: bytes) -> list[bytes]:
    """The parts of the events that do not name the request."""
    return [line.partition(b'"choices"')[2] for line in data.split(b"\n") if b'"choices"' in line]
