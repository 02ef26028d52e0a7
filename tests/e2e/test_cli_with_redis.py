"""The commands that talk to Redis, against every real server found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pipeline.cli.doctor import check_batches, check_files, check_redis
from pipeline.config import FilesSettings, RedisSettings, RouterSettings, RqSettings, Settings
from pipeline.connection import Connection
from pipeline.findings import Grade
from pipeline.keys import PoolKeys, batches_open
from pipeline.redis_server import RedisServer
from pipeline.snapshot import take_snapshot

REPOSITORY = Path(__file__).parents[2]


def baton(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=60)


async def test_set_router_changes_what_running_apis_read(redis_url):
    # Given a value that is changed at run time
    result = baton("config", "set-router", "--max-local-prefill-length", "512", "--set", f"redis.url={redis_url}")
    assert result.stdout == ("baton-tiny max_local_prefill_length = 512\nbaton-tiny max_prefill_queue_size = 1000000\n")

    # Then a reader of the pool sees it over its own initial values
    connection = Connection(RedisSettings(url=redis_url))
    snapshot = await take_snapshot(connection, PoolKeys("baton-tiny"))
    await connection.close()
    assert snapshot.router(RouterSettings()) == RouterSettings(max_local_prefill_length=512)

    # And a call without values only tells
    told = baton("config", "set-router", "--json", "--set", f"redis.url={redis_url}")
    assert json.loads(told.stdout) == {
        "baton-tiny": {"max_local_prefill_length": 512, "max_prefill_queue_size": 1_000_000}
    }


def test_set_router_finds_the_private_server_of_the_folder(short_dir):
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        result = baton("config", "set-router", "--json", "--set", f"redis.run_dir={short_dir}")
    assert result.returncode == 0
    gone = baton("config", "set-router", "--json", "--set", f"redis.run_dir={short_dir}")
    assert gone.returncode == 4
    assert gone.stderr.startswith("baton: no Redis: redis.url is empty and ")


def test_set_router_refuses_an_unknown_pool(redis_url):
    result = baton("config", "set-router", "--pool", "baton-tin", "--set", f"redis.url={redis_url}")
    assert result.returncode == 2
    assert result.stderr == "baton: --pool: unknown pool baton-tin; did you mean baton-tiny?\n"


async def test_doctor_finds_nothing_wrong_with_a_private_server(redis_server, redis_url):
    findings = await check_redis(RedisSettings(url=redis_url))
    assert {finding.grade for finding in findings} == {Grade.OK}
    assert findings[0].text == f"redis {redis_server.program.version_text} runs"


async def test_doctor_names_what_would_lose_requests(short_dir):
    options = ["--maxmemory-policy", "allkeys-lru", "--appendonly", "no"]
    with RedisServer.start(short_dir, options=options) as server:
        server.wait_ready()
        findings = {finding.check: finding for finding in await check_redis(RedisSettings(url=server.url))}
    assert findings["redis eviction"].grade is Grade.ERROR
    assert findings["redis eviction"].fix == "redis-cli config set maxmemory-policy noeviction"
    assert findings["redis durability"].grade is Grade.WARNING


async def test_doctor_says_when_nothing_answers(short_dir):
    (finding,) = await check_redis(RedisSettings(url=f"unix://{short_dir}/none.sock"))
    assert finding.grade is Grade.ERROR
    assert "BATON_REDIS_URL" in finding.fix


@pytest.mark.parametrize("as_json", [True, False])
def test_doctor_ends_with_1_when_there_is_an_error(short_dir, as_json):
    flags = ["--json"] if as_json else []
    settings = ["--set", f"redis.url=unix://{short_dir}/none.sock", "--set", "pools.baton-tiny.engine=mock"]
    result = baton("doctor", *flags, *settings)
    assert result.returncode == 1
    if as_json:
        graded = {finding["check"]: finding["grade"] for finding in json.loads(result.stdout)}
        assert graded["redis"] == "error"
        assert msgspec.convert(graded, dict[str, Grade])
    else:
        assert "error   redis" in result.stdout
        assert "-> start it, or correct redis.url" in result.stdout


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("{folder}/new/files", "made by the first file"),
        ("file://{folder}", "MiB free"),
        ("memory://somewhere", "takes files and gives them back"),
    ],
)
async def test_doctor_sees_that_files_can_be_kept(tmp_path: Path, url: str, says: str) -> None:
    (finding,) = await check_files(FilesSettings(url=url.format(folder=tmp_path)))
    assert finding.grade is Grade.OK
    assert says in finding.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("{folder}/file/files", "", "file is no folder that can be written to"),
        ("nothing://somewhere", "", "Protocol not known"),
        ("s3://nowhere", '{"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}', "failed to "),
    ],
)
async def test_doctor_says_where_files_cannot_be_kept(tmp_path: Path, url: str, options: str, says: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    settings = FilesSettings(url=url.format(folder=tmp_path), storage_options=options, timeout_s=1)
    (finding,) = await check_files(settings)
    assert finding.grade is Grade.ERROR
    assert says in finding.text
    assert "files.url" in finding.fix


async def test_doctor_says_when_batches_wait_for_a_worker(redis_url: str) -> None:
    settings = Settings(redis=RedisSettings(url=redis_url))
    connection = Connection(settings.redis)
    (finding,) = await check_batches(settings)
    assert (finding.grade, finding.text) == (Grade.OK, "0 that nobody has, 0 batch workers")
    await connection.command("ZADD", batches_open(), 0, "batch_1")
    (finding,) = await check_batches(settings)
    assert (finding.grade, finding.text) == (Grade.WARNING, "1 that nobody has, 0 batch workers")
    assert finding.fix == "start one: baton worker batch"
    await connection.close()


async def test_doctor_says_when_rq_has_no_redis(redis_url: str, short_dir: Path) -> None:
    settings = Settings(redis=RedisSettings(url=redis_url), rq=RqSettings(url=f"unix://{short_dir}/none.sock"))
    (finding,) = await check_batches(settings)
    assert finding.grade is Grade.WARNING
    assert "rq.url" in finding.fix
