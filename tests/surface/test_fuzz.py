"""A short run of the fuzzing of the HTTP surface (`make fuzz` is a long one), and what schemathesis says of keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import schemathesis
from schemathesis.specs.openapi.checks import ignored_auth

from pipeline.api_keys import digest_of
from pipeline.redis_server import RedisServer
from tests.fuzz.asks import drawn
from tests.fuzz.run import Plan, run
from tests.serving import serving

KEY = "baton-sk-fuzz"


async def test_requests_of_all_kinds_get_answers_of_the_page_and_leave_nothing(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    report = await run(Plan(requests=400, seed=1, clients=8, settle=0), default_redis_server, tmp_path)
    assert report.complaints() == []
    assert report.tally.statuses[200] > 30
    assert report.tally.streams > 5
    assert report.tally.left_streams > 1


async def test_a_key_that_is_needed_is_not_ignored(default_redis_server: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[team]\ndigest = "{digest_of(KEY)}"\n')
    async with serving(default_redis_server, tmp_path, f"api.keys_file={keys}") as served:
        count = await asyncio.to_thread(look_for_ignored_keys, served.url)
    assert count > 30


def look_for_ignored_keys(url: str) -> int:
    """Ask every operation once with the key; the check asks again without it, and with another one."""
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    schema.config.update(base_url=url)
    count = 0
    for operation in schema.get_all_operations():
        for case in drawn(operation.ok().as_strategy(), 1, 1):
            case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=[ignored_auth], timeout=30)
            count += 1
    return count
