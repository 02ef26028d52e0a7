"""Results of a batch become parts: each line is in one of them, whatever fails on the way, and only then Redis drops its request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.batches.lines import Line
from pipeline.batches.record import IDS, BatchRecord, LineError
from pipeline.batches.records import BatchRecords, Fenced, Hold
from pipeline.config import FilesSettings, RedisSettings
from pipeline.connection import Connection
from pipeline.errors import RedisUnavailable, StorageUnavailable
from pipeline.files.store import FileStore
from pipeline.keys import PoolKeys, batch_lease, batch_record, batches_open
from tests.proxy import RedisProxy, Trap
from workers.batch import results
from workers.batch.results import Parts, is_success, missing_line, result_line
from workers.batch.sending import Result, Sent
from workers.batch.tidy import Leftovers

ID = IDS.new(1.0)


def request_id(number: int) -> str:
    return f"p-{number:022}"


class Desk:
    """A batch in progress in the hands of a worker, over a line that can be cut."""

    def __init__(self, direct: Connection, proxy: RedisProxy, folder: Path) -> None:
        self.connection = direct
        self.proxy = proxy
        self.lossy = Connection(RedisSettings(url=proxy.url, timeout_s=0.3))
        self.records = BatchRecords(direct, lease_s=60, keep_s=600)
        self.files = FileStore(FilesSettings(url=str(folder)), direct)
        self.requests = PoolKeys("p")
        self.now_s = 100.0
        self.hold = Hold(ID, "", 0)

    async def begin(self) -> None:
        record = BatchRecord(
            id=ID, owner="me", state="in_progress", endpoint="/v1/completions", input_file_id="f", window="24h",
            created_s=1, deadline_s=2, total=100,
        )  # fmt: skip
        await self.records.put(record)
        taken = await self.records.take(ID, "worker")
        assert isinstance(taken, Hold)
        self.hold = taken
        rows = [
            ("HSET", self.requests.request(request_id(one)), "state", "done", "n", 1, "body", "asked")
            for one in range(100)
        ]
        await self.connection.commands(*rows)

    async def erased(self) -> list[int]:
        """Which requests are forgotten."""
        rows = [("HEXISTS", self.requests.request(request_id(one)), "body") for one in range(100)]
        kept = await self.connection.commands(*rows)
        return [one for one, is_there in enumerate(kept) if not is_there]

    def parts(self, most_lines: int = 4, longest_s: float = 10) -> Parts:
        over = BatchRecords(self.lossy, lease_s=60, keep_s=600)
        return Parts(
            self.files.scratch,
            over,
            self.hold,
            Leftovers(self.lossy, over, self.files.scratch),
            most_lines=most_lines,
            longest_s=longest_s,
            clock=lambda: self.now_s,
        )

    def result(self, number: int, status: int = 200, body: bytes = b'{"a":1}') -> Result:
        sent = [Sent(cast(Any, None), request_id(number))]
        return Result(Line(number, f"id {number}", "/v1/completions", b"{}"), status, body, sent, 5, 1, 2)

    async def kept(self) -> list[str]:
        """The custom ids of all parts, in their order."""
        lines = []
        for place, nbytes in await self.records.parts(ID):
            data = b"".join([block async for block in self.files.scratch.blocks(place, nbytes)])
            lines += [json.loads(line)["custom_id"] for line in data.splitlines()]
        return lines


@pytest.fixture
async def desk(default_redis_url: str, short_dir: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    direct = Connection(RedisSettings(url=default_redis_url))
    async with RedisProxy(default_redis_url.removeprefix("unix://"), short_dir) as proxy:
        desk = Desk(direct, proxy, tmp_path / "files")
        await desk.begin()
        yield desk
        await desk.lossy.close()
    await direct.close()


def ids(*numbers: int) -> list[str]:
    return [f"id {number}" for number in numbers]


async def test_parts_have_no_more_lines_than_are_set_and_count_them(desk: Desk) -> None:
    parts = desk.parts()
    for number in range(10):
        parts.add(desk.result(number, 200 if number % 3 else 400))
    await parts.keep()
    assert await desk.kept() == ids(*range(10))
    assert len(await desk.records.parts(ID)) == 3
    assert await desk.erased() == list(range(10))
    found = await desk.records.find(ID)
    assert found is not None
    assert (found.completed, found.failed, found.prompt_tokens, found.completion_tokens) == (6, 4, 50, 20)
    assert len(await desk.records.done(ID)) == 10
    await parts.keep()  # nothing is left to keep
    assert len(await desk.records.parts(ID)) == 3


async def test_a_part_is_due_when_it_is_full_in_lines_or_bytes_or_has_waited(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = desk.parts(most_lines=2)
    assert not parts.is_due
    parts.add(desk.result(0))
    assert not parts.is_due
    desk.now_s += 11
    assert parts.is_due
    await parts.keep()
    assert not parts.is_due
    parts.add(desk.result(1))
    parts.add(desk.result(2))
    assert parts.is_due
    await parts.keep()
    monkeypatch.setattr(results, "PART_BYTES", 1000)
    parts.add(desk.result(3, body=b'"' + b"x" * 1000 + b'"'))
    assert parts.is_due


@pytest.mark.parametrize("side", ["before", "reply"])
async def test_a_part_that_redis_did_not_answer_is_kept_once(desk: Desk, side: Any) -> None:
    """Whether or not Redis heard of it."""
    parts = desk.parts()
    for number in range(3):
        parts.add(desk.result(number))
    trap = desk.proxy.arm(Trap("put_part", side, holds=True))
    with pytest.raises(RedisUnavailable):
        await parts.keep()
    assert trap.hit.is_set() and await desk.erased() == []
    trap.cut()
    for number in range(3, 6):  # answers that came while it was away
        parts.add(desk.result(number))
    await parts.keep()
    assert await desk.kept() == ids(*range(6))
    found = await desk.records.find(ID)
    assert found is not None and found.completed == 6
    assert len(await desk.files.scratch.names()) == len(await desk.records.parts(ID)) == 2


async def test_what_the_store_refuses_is_kept_when_it_works_again(desk: Desk, tmp_path: Path) -> None:
    parts = desk.parts()
    parts.add(desk.result(0))
    (tmp_path / "files").write_text("no folder")
    with pytest.raises(StorageUnavailable):
        await parts.keep()
    assert await desk.records.parts(ID) == [] and await desk.erased() == []
    (tmp_path / "files").unlink()
    await parts.keep()
    assert await desk.kept() == ids(0)


async def test_a_second_go_of_the_same_worker_writes_over_nothing(desk: Desk) -> None:
    """It goes on with new `Parts` under the same epoch, when Redis or the store was away in between."""
    for number in range(3):
        parts = desk.parts()
        parts.add(desk.result(number))
        await parts.keep()
    assert await desk.kept() == ids(0, 1, 2)


async def test_who_lost_the_batch_keeps_nothing_more_and_drops_no_request(desk: Desk) -> None:
    parts = desk.parts()
    parts.add(desk.result(0))
    await desk.connection.command("DEL", batch_lease(ID))
    await desk.records.take(ID, "another")
    with pytest.raises(Fenced):
        await parts.keep()
    assert await desk.records.parts(ID) == [] and await desk.erased() == []


async def test_parts_of_a_batch_that_another_version_has_are_no_leftovers(desk: Desk) -> None:
    parts = desk.parts()
    parts.add(desk.result(0))
    await parts.keep()
    await desk.connection.command("HSET", batch_record(ID), "total", "many")
    leftovers = Leftovers(desk.connection, desk.records, desk.files.scratch)
    await leftovers.remove_all(is_thorough=True)
    assert await desk.kept() == ids(0)
    await desk.connection.command("ZREM", batches_open(), ID)
    await leftovers.remove_all(is_thorough=True)
    assert await desk.files.scratch.names() == await desk.records.parts(ID) == []


# -- lines --------------------------------------------------------------------------------------------------------------


def test_a_result_is_a_line_of_openais_form() -> None:
    line = Line(7, 'an "id" \u2028 é', "/v1/completions", b"{}")
    sent = [Sent(cast(Any, None), "request-1"), Sent(cast(Any, None), "request-2")]
    data = result_line(ID, Result(line, 200, b'{"object":"text_completion"}', sent))
    assert data.count(b"\n") == 1 and data.endswith(b"\n")
    assert json.loads(data) == {
        "id": f"batch_req_{ID.removeprefix('batch_')}_7",
        "custom_id": line.custom_id,
        "response": {"status_code": 200, "request_id": "request-1", "body": {"object": "text_completion"}},
        "error": None,
    }


@pytest.mark.parametrize(("status", "is_good"), [(200, True), (400, False), (404, False), (500, False), (504, False)])
def test_what_succeeded_is_told_from_the_line_alone(status: int, is_good: bool) -> None:
    result = Result(Line(0, "a", "/v1/completions", b"{}"), status, b'{"error":{"message":"m"}}')
    assert is_success(result_line(ID, result)) == result.is_success == is_good
    assert json.loads(result_line(ID, result))["response"]["request_id"] == ""


def test_a_line_that_did_not_run_has_an_error_and_no_response() -> None:
    data = missing_line(ID, Line(3, "a", "/v1/completions", b"{}"), LineError("batch_expired", "too late"))
    told = json.loads(data)
    assert (told["response"], told["error"]) == (None, {"code": "batch_expired", "message": "too late"})
    assert not is_success(data)
