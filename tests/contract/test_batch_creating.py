"""Batches are made, found and cancelled by their owners, with real Redis and rq's queue in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from pipeline.batches.creating import BatchBody, Batches, OutputLife
from pipeline.batches.jobs import BatchQueue
from pipeline.batches.records import BatchRecords, Hold
from pipeline.config import BatchesSettings, FilesSettings, RedisSettings, RqSettings
from pipeline.connection import Connection
from pipeline.errors import BatchNotFound, IdempotencyConflict, InvalidRequest
from pipeline.files.record import IDS as FILE_IDS
from pipeline.files.record import FileRecord
from pipeline.files.records import FileRecords
from pipeline.files.store import FileStore
from pipeline.keys import batch_record

LIMIT = 209_715_200  # 200 MB


class Desk:
    """Where batches are made."""

    def __init__(self, url: str, rq_url: str = "") -> None:
        settings = RedisSettings(url=url, timeout_s=1)
        self.connection = Connection(settings)
        self.records = BatchRecords(self.connection, lease_s=60, keep_s=60)
        self.queue = BatchQueue(settings, RqSettings(url=rq_url))
        files = FileStore(FilesSettings(url="memory://batches"), self.connection)
        self.batches = Batches(BatchesSettings(), self.records, files, self.queue)

    async def file(self, nbytes: int = 10, owner: str = "me", purpose: str = "batch", expires_s: int = 0) -> str:
        """What is known of a file; its bytes are not looked at."""
        record = FileRecord(
            id=FILE_IDS.new(1.0), owner=owner, purpose=purpose, filename="a", bytes=nbytes, created_s=1, place="nowhere",
            expires_s=expires_s,
        )  # fmt: skip
        await FileRecords(self.connection).put(record)
        return record.id

    async def close(self) -> None:
        self.queue.close()
        await self.connection.close()


@pytest.fixture
async def desk(default_redis_url: str) -> AsyncIterator[Desk]:
    desk = Desk(default_redis_url)
    yield desk
    await desk.close()


def body(file_id: str, **more: Any) -> BatchBody:
    return BatchBody(**{"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "2h", **more})


async def test_a_batch_is_kept_and_waits_in_the_queue(desk: Desk) -> None:
    asked = body(await desk.file(), metadata={"a": "b"}, output_expires_after=OutputLife("created_at", 3600))
    made = await desk.batches.create(asked, owner="me", models="one two")
    assert await desk.records.find(made.id) == made == await desk.batches.find(made.id, "me")
    assert (made.state, made.models, made.metadata, made.output_life_s) == ("validating", "one two", '{"a":"b"}', 3600)
    assert made.deadline_s - made.created_s == 7200
    assert desk.queue.queue.job_ids == [made.id]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nbytes": LIMIT + 1}, "200 MB"),
        ({"owner": "you"}, "No such File"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"expires_s": 2}, "No such File"),
        (None, "No such File"),
    ],
)
async def test_a_file_that_is_no_input_is_refused_and_nothing_is_made(desk: Desk, fields: Any, says: str) -> None:
    file_id = "file-none" if fields is None else await desk.file(**fields)
    with pytest.raises(InvalidRequest, match=says) as caught:
        await desk.batches.create(body(file_id), owner="me")
    assert caught.value.param == "input_file_id"
    assert await desk.connection.command("KEYS", "{@batches}:*") == []
    assert desk.queue.queue.job_ids == []


async def test_a_file_of_just_200_mb_is_a_batch(desk: Desk) -> None:
    assert BatchesSettings().max_bytes == LIMIT
    assert (await desk.batches.create(body(await desk.file(LIMIT)), owner="me")).state == "validating"


async def test_a_batch_is_made_once_under_a_key(desk: Desk) -> None:
    asked = body(await desk.file())
    first = await desk.batches.create(asked, owner="me", idempotency_key="k")
    await desk.records.turn(first, "in_progress", total=7)
    again = await desk.batches.create(asked, owner="me", idempotency_key="k")
    assert (again.id, again.state, again.total) == (first.id, "in_progress", 7)
    with pytest.raises(IdempotencyConflict):
        await desk.batches.create(
            msgspec.structs.replace(asked, completion_window="3h"), owner="me", idempotency_key="k"
        )
    assert desk.queue.queue.job_ids == [first.id]


async def test_batches_of_others_are_not_there(desk: Desk) -> None:
    made = await desk.batches.create(body(await desk.file()), owner="me")
    for batch_id, owner in ((made.id, "you"), (made.id, ""), (made.id[:-1], "me"), ("x" * 9999, "me")):
        with pytest.raises(BatchNotFound):
            await desk.batches.find(batch_id, owner)
        with pytest.raises(BatchNotFound):
            await desk.batches.cancel(batch_id, owner)
    assert (await desk.batches.find(made.id, "me")).state == "validating"


@pytest.mark.parametrize(
    ("state", "then"),
    [
        ("validating", "cancelled"), ("in_progress", "cancelling"), ("finalizing", "finalizing"),
        ("cancelling", "cancelling"), ("completed", "completed"), ("cancelled", "cancelled"),
    ],
)  # fmt: skip
async def test_a_cancel_ends_what_is_not_over(desk: Desk, state: str, then: str) -> None:
    made = await desk.batches.create(body(await desk.file()), owner="me")
    begun_s = int(state != "validating")
    await desk.connection.command("HSET", batch_record(made.id), "state", state, "in_progress_s", begun_s)
    for _ in range(2):
        cancelled = await desk.batches.cancel(made.id, "me")
        assert cancelled.state == then
        assert (cancelled.cancelling_s > 0) == (state in ("validating", "in_progress"))
        assert (cancelled.cancelled_s > 0) == (state == "validating")


async def test_a_batch_that_a_worker_reads_is_left_to_it(desk: Desk) -> None:
    made = await desk.batches.create(body(await desk.file()), owner="me")
    hold = await desk.records.take(made.id, "worker")
    assert isinstance(hold, Hold)
    assert (await desk.batches.cancel(made.id, "me")).state == "cancelling"
    assert await desk.records.turn(made, "in_progress", hold, total=3) == "cancelling"


async def test_pages_say_whether_more_follow(desk: Desk) -> None:
    ids = [(await desk.batches.create(body(await desk.file()), owner="me")).id for _ in range(5)]
    first, more = await desk.batches.page("me", after="", limit=3)
    assert ([one.id for one in first], more) == (ids[:1:-1], True)
    rest, more = await desk.batches.page("me", after=first[-1].id, limit=2)
    assert ([one.id for one in rest], more) == (ids[1::-1], False)


async def test_a_queue_that_does_not_answer_is_no_loss(default_redis_url: str) -> None:
    """The batch is there, and a batch worker looks for those that nobody has."""
    desk = Desk(default_redis_url, rq_url="unix:///tmp/nobody-listens-here.sock")
    made = await desk.batches.create(body(await desk.file()), owner="me")
    assert await desk.records.unheld() == [made.id]
    await desk.close()
