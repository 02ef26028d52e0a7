"""The scripts of batches: called once, called twice, and with their first reply lost; and by who is fenced."""

from __future__ import annotations

import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import Batch

from pipeline.batches.record import ENDED, FOLLOWS, IDS, BatchRecord
from pipeline.batches.records import BatchRecords, Done, Fenced, Hold, NotTaken, Part, holder_name
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import IdempotencyConflict, QueueFull
from pipeline.keys import BATCHES_ROOT, batch_done, batch_lease, batch_list, batch_parts, batch_record, batches_open
from tests.proxy import RedisProxy, Trap

LEASE_S, KEEP_S = 60.0, 600.0
ID = IDS.new(1.0)
RECORD = BatchRecord(
    id=ID, owner="me", state="validating", endpoint="/v1/completions", input_file_id="file-1", window="24h", created_s=1,
    deadline_s=86_401,
)  # fmt: skip
PART = Part(
    "folder/part-1", 99, (0, 2, 9), completed=2, failed=1, prompt_tokens=30, cached_tokens=5, completion_tokens=7
)
STATES = typing.get_args(Batch.model_fields["status"].annotation)
STALE = Hold(ID, "first", 1)


class Store:
    """Records over one Redis, whose calls may go through a line that loses replies."""

    def __init__(self, direct: Connection, url: str, proxy: RedisProxy) -> None:
        self.connection = direct
        self.records = self.over(direct)
        self.lossy = Connection(RedisSettings(url=proxy.url))
        self.proxy = proxy

    def over(self, connection: Connection) -> BatchRecords:
        return BatchRecords(connection, lease_s=LEASE_S, keep_s=KEEP_S)

    async def make(self, state: str = "validating", **fields: Any) -> BatchRecord:
        record = msgspec.structs.replace(RECORD, state=state, **fields)
        await self.records.put(record)
        return record

    async def hold(self, worker: str = "first") -> Hold:
        taken = await self.records.take(ID, worker)
        assert isinstance(taken, Hold)
        return taken

    async def taken_over(self) -> Hold:
        """The lease of the first worker ran out, and a second one has the batch."""
        await self.hold()
        await self.connection.command("DEL", batch_lease(ID))
        return await self.hold("second")

    async def holds(self) -> dict[bytes, Any]:
        """All that Redis holds."""
        keys = sorted(await self.connection.command("KEYS", "*"))
        return {key: await self.connection.command("DUMP", key) for key in keys}

    async def same_again(self, call: Callable[[BatchRecords], Awaitable[Any]]) -> Any:
        """What a call answers; it answers and leaves the same when it is repeated, and when its first reply is lost."""
        before = await self.holds()
        lost = self.proxy.arm(Trap(None, "reply"))
        first = await call(self.over(self.lossy))
        assert lost.hit.is_set()
        after = await self.holds()
        assert await call(self.records) == first
        assert await self.holds() == after
        await self.connection.command("FLUSHALL")
        for key, value in before.items():
            await self.connection.command("RESTORE", key, 0, value)
        assert await call(self.records) == first  # once, with nothing lost
        assert await self.holds() == after
        return first


@pytest.fixture
async def store(redis_url: str, short_dir: Path) -> AsyncIterator[Store]:
    direct = Connection(RedisSettings(url=redis_url))
    async with RedisProxy(redis_url.removeprefix("unix://"), short_dir) as proxy:
        store = Store(direct, redis_url, proxy)
        yield store
        await store.lossy.close()
    await direct.close()


# -- put --------------------------------------------------------------------------------------------------------------


async def test_a_batch_is_made_once(store: Store) -> None:
    assert await store.same_again(lambda records: records.put(RECORD)) == ID
    assert await store.records.find(ID) == RECORD
    assert await store.records.page("me", "", 9) == [RECORD]
    assert await store.records.page("you", "", 9) == []
    assert await store.records.unheld() == [ID]


async def test_a_key_stands_for_the_first_batch_that_was_made_under_it(store: Store) -> None:
    assert await store.same_again(lambda records: records.put(RECORD, "key", "digest")) == ID
    other = msgspec.structs.replace(RECORD, id=IDS.new(2.0))
    assert await store.same_again(lambda records: records.put(other, "key", "digest")) == ID
    assert await store.records.find(other.id) is None
    with pytest.raises(IdempotencyConflict, match=ID):
        await store.records.put(other, "key", "another digest")
    assert await store.records.put(other, "another key", "digest") == other.id
    assert [one.id for one in await store.records.page("me", "", 9)] == [other.id, ID]
    assert 0 < await store.connection.command("TTL", f"{BATCHES_ROOT}idem:another key") <= 86_400


async def test_what_is_answered_counts_before_it_is_kept(store: Store) -> None:
    await store.make("in_progress", total=9)
    hold = await store.hold()
    assert await store.same_again(lambda records: records.hold(hold, (4, 1))) == "in_progress"
    record = await store.records.find(ID)
    assert record is not None
    assert record.counts == {"total": 9, "completed": 4, "failed": 1}
    assert (record.completed, record.failed) == (0, 0)
    ended = msgspec.structs.replace(record, state="cancelled", completed=2, failed=1)
    assert ended.counts == {"total": 9, "completed": 2, "failed": 1}  # what was not kept is not there


async def test_a_batch_that_is_on_its_way_is_not_made_anew(store: Store) -> None:
    await store.make()
    hold = await store.hold()
    await store.records.turn(RECORD, "in_progress", hold, total=3)
    assert await store.records.put(RECORD) == ID
    found = await store.records.find(ID)
    assert found is not None and (found.state, found.total) == ("in_progress", 3)


# -- take, hold, let go -------------------------------------------------------------------------------------------------


async def test_one_worker_takes_a_batch_and_another_one_is_told_who_has_it(store: Store) -> None:
    await store.make()
    assert await store.same_again(lambda records: records.take(ID, "first")) == Hold(ID, "first", 1)
    assert await store.records.take(ID, "second") == NotTaken("held", "first")
    assert await store.records.unheld() == []
    assert 0 < await store.connection.command("PTTL", batch_lease(ID)) <= LEASE_S * 1000


async def test_when_its_lease_is_over_another_worker_takes_it_under_a_new_epoch(store: Store) -> None:
    await store.make()
    assert await store.taken_over() == Hold(ID, "second", 2)


async def test_what_is_let_go_is_taken_at_once_and_only_by_who_held_it(store: Store) -> None:
    await store.make()
    second = await store.taken_over()
    await store.same_again(lambda records: records.let_go(STALE))
    assert await store.records.take(ID, "third") == NotTaken("held", "second")
    await store.same_again(lambda records: records.let_go(second))
    assert await store.records.take(ID, "third") == Hold(ID, "third", 3)


async def test_what_a_dead_worker_held_is_let_go_and_nothing_of_another_one(store: Store) -> None:
    ids = [IDS.new(float(second)) for second in range(4)]
    for one, worker in zip(ids, ("batch-1", "batch-10", "batch-1", ""), strict=True):
        await store.make(id=one)
        if worker:
            await store.records.take(one, holder_name(worker, "a1"))
    assert await store.records.evict("batch-1") == [ids[0], ids[2]]
    assert await store.records.unheld() == [ids[0], ids[2], ids[3]]
    assert await store.records.evict("batch-1") == await store.records.evict("batch") == []


async def test_a_batch_that_has_ended_or_is_not_there_is_not_taken(store: Store) -> None:
    assert await store.records.take(ID, "first") == NotTaken("gone")
    await store.make()
    await store.records.turn(RECORD, "failed")
    assert await store.records.take(ID, "first") == NotTaken("ended", "failed")
    await store.connection.command("ZADD", batches_open(), 0, "batch_lost")
    assert await store.records.take("batch_lost", "first") == NotTaken("gone")
    assert await store.records.unheld() == []


async def test_a_hold_is_renewed_and_says_the_state(store: Store) -> None:
    await store.make()
    hold = await store.hold()
    await store.connection.command("PEXPIRE", batch_lease(ID), 1000)
    assert await store.records.hold(hold) == "validating"
    assert await store.connection.command("PTTL", batch_lease(ID)) > 1000
    await store.records.turn(RECORD, "cancelling")
    assert await store.records.hold(hold) == "cancelling"
    await store.connection.command("DEL", batch_lease(ID))  # it ran out, and nobody came
    assert await store.records.hold(hold) == "cancelling"


# -- fenced -------------------------------------------------------------------------------------------------------------


async def _hold(records: BatchRecords) -> None:
    await records.hold(STALE)


async def _turn(records: BatchRecords) -> None:
    await records.turn(RECORD, "in_progress", STALE, total=1)


async def _put_part(records: BatchRecords) -> None:
    await records.put_part(STALE, PART)


WRITES = pytest.mark.parametrize("write", [_hold, _turn, _put_part])


@WRITES
async def test_who_lost_a_batch_changes_nothing_more(store: Store, write: Any) -> None:
    await store.make()
    await store.taken_over()
    before = await store.holds()
    with pytest.raises(Fenced, match=ID):
        await write(store.records)
    assert await store.holds() == before


@WRITES
async def test_nobody_changes_what_has_ended(store: Store, write: Any) -> None:
    await store.make()
    hold = await store.hold()
    await store.records.turn(RECORD, "failed", hold)
    before = await store.holds()
    if write is _turn:
        assert await store.records.turn(RECORD, "in_progress", hold) == "failed"
    else:
        with pytest.raises(Fenced):
            await write(store.records)
    assert await store.holds() == before


@WRITES
async def test_what_is_not_there_is_not_made(store: Store, write: Any) -> None:
    with pytest.raises(Fenced):
        await write(store.records)
    assert await store.holds() == {}


# -- turn ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
async def test_only_the_states_follow_that_may(store: Store, state: str) -> None:
    for to in STATES:
        await store.connection.command("FLUSHALL")
        await store.make(state)
        may = to in FOLLOWS.get(state, ()) or to == state
        assert await store.records.turn(RECORD, to, model="m") == (to if may else state)
        found = await store.records.find(ID)
        assert found is not None and (found.state, found.model) == ((to, "m") if may else (state, ""))


@pytest.mark.parametrize("end", ENDED)
async def test_an_end_drops_lines_and_lease_and_keeps_the_record_for_a_while(store: Store, end: str) -> None:
    await store.make()
    hold = await store.hold()
    await store.records.put_part(hold, PART)
    before = next(state for state, after in FOLLOWS.items() if end in after)
    await store.connection.command("HSET", batch_record(ID), "state", before)
    assert await store.same_again(lambda records: records.turn(RECORD, end, hold, completed_s=5)) == end
    assert await store.records.untidy() == [ID]  # its parts are still to be removed
    await store.records.tidied(ID)
    assert set(await store.holds()) == {batch_record(ID).encode(), batch_list("me").encode()}
    assert 0 < await store.connection.command("TTL", batch_record(ID)) <= KEEP_S
    await store.connection.command("DEL", batch_record(ID))  # its time is over
    assert await store.records.page("me", "", 9) == []
    assert await store.holds() == {}


# -- parts --------------------------------------------------------------------------------------------------------------


async def test_a_part_is_counted_once(store: Store) -> None:
    await store.make("in_progress", total=10)
    hold = await store.hold()
    await store.same_again(lambda records: records.put_part(hold, PART))
    more = Part("folder/part two", 5, (1, 40_000), 1, 1, 1, 1, 1)
    await store.records.put_part(hold, more)
    found = await store.records.find(ID)
    assert found is not None
    counts = (found.completed, found.failed, found.prompt_tokens, found.cached_tokens, found.completion_tokens)
    assert counts == (3, 2, 31, 6, 8)
    assert await store.records.parts(ID) == [("folder/part-1", 99), ("folder/part two", 5)]


async def test_the_lines_of_parts_are_done_and_no_others(store: Store) -> None:
    assert len(await store.records.done(ID)) == 0
    await store.make("in_progress")
    hold = await store.hold()
    await store.records.put_part(hold, PART)
    await store.records.put_part(hold, Part("folder/part-2", 5, (7, 8, 49_999), 3, 0, 0, 0, 0))
    done = await store.records.done(ID)
    assert [line for line in range(60_000) if line in done] == [0, 2, 7, 8, 9, 49_999]
    assert len(done) == 6
    assert 10**9 not in done and 0 not in Done(b"")


async def test_a_full_part_is_one_call(store: Store) -> None:
    await store.make("in_progress")
    hold = await store.hold()
    await store.records.put_part(hold, Part("folder/part", 1, range(49_000, 50_000), 1000, 0, 0, 0, 0))
    assert len(await store.records.done(ID)) == 1000
    assert await store.connection.command("EXISTS", batch_done(ID), batch_parts(ID)) == 2


async def test_a_full_redis_takes_what_lets_it_drop_more_and_nothing_new(store: Store) -> None:
    await store.make("in_progress")
    await store.connection.command("CONFIG", "SET", "maxmemory", "1kb")
    try:
        with pytest.raises(QueueFull):
            await store.records.put(msgspec.structs.replace(RECORD, id=IDS.new(2.0)))
        hold = await store.hold()
        assert await store.records.hold(hold, (2, 1)) == "in_progress"
        await store.records.put_part(hold, PART)
        for state in ("finalizing", "completed"):
            assert await store.records.turn(RECORD, state, hold, completed_s=5) == state
    finally:
        await store.connection.command("CONFIG", "SET", "maxmemory", "0")


# -- pages --------------------------------------------------------------------------------------------------------------


async def test_pages_are_the_newest_first_and_go_on_behind_an_id(store: Store) -> None:
    ids = [IDS.new(float(second)) for second in range(7)]
    for one in ids:
        await store.make(id=one)
    await store.connection.command("DEL", batch_record(ids[4]))
    found = await store.records.page("me", "", 3)
    assert [one.id for one in found] == [ids[6], ids[5], ids[3]]
    assert [one.id for one in await store.records.page("me", ids[3], 9)] == ids[2::-1]


async def test_a_record_of_another_version_is_passed_over(store: Store) -> None:
    await store.make()
    await store.connection.command("HSET", batch_record(ID), "total", "many")
    assert await store.records.find(ID) is None
    assert await store.records.page("me", "", 9) == []
    assert await store.connection.command("ZCARD", batch_list("me")) == 1  # for a version that can read it


async def test_a_list_forgets_what_is_no_more_also_where_nobody_reads_it(store: Store) -> None:
    ids = [IDS.new(float(second)) for second in range(6)]
    for one in ids[:4]:
        await store.make(id=one)
    await store.connection.command("DEL", *(batch_record(one) for one in ids[:3]))
    for one in ids[4:]:
        await store.make(id=one)
    assert await store.connection.command("ZRANGE", batch_list("me"), 0, -1) == [one.encode() for one in ids[3:]]


async def test_what_has_ended_is_told_whether_or_not_it_can_be_read(store: Store) -> None:
    over, unreadable, gone = (IDS.new(float(second)) for second in (1, 2, 3))
    for one in (over, unreadable):
        await store.make(id=one)
    await store.records.turn(msgspec.structs.replace(RECORD, id=over), "failed")
    await store.connection.command("HSET", batch_record(unreadable), "total", "many")
    assert await store.records.ended([over, unreadable, gone]) == [over, gone]
    assert await store.records.ended([]) == []
