"""Who scales a pool: the lease, what is decided under it, and what is known of workers whose supervisor was killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.events import listen
from pipeline.keys import PoolKeys
from pipeline.scaling.lease import PoolTaken, ScalerLease
from pipeline.scaling.memory import Memory
from pipeline.scaling.policy import Decision, StageDecision
from pipeline.snapshot import text_pairs

POOL = "tiny"
KEYS = PoolKeys(POOL)
UP = Decision(StageDecision(1, 1, "calm"), StageDecision(0, 2, "much to do"), Memory())
OTHER = """
import asyncio, sys
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.scaling.lease import ScalerLease

async def main():
    lease = ScalerLease(Connection(RedisSettings(url=sys.argv[1])), "tiny")
    await lease.take()
    await lease.join("decode-0-abc", "decode")
    print("taken", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    connection = Connection(RedisSettings(url=redis_url))
    yield connection
    await connection.close()


@pytest.fixture
def other(redis_url: str):
    process = subprocess.Popen([sys.executable, "-c", OTHER, redis_url], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"taken\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


async def scaling(connection: Connection) -> dict[str, str]:
    return text_pairs(await connection.command("HGETALL", KEYS.scaling()))


async def test_a_lease_that_is_held_is_told_with_its_holder(connection: Connection, other) -> None:
    with pytest.raises(PoolTaken, match=f"pool tiny is scaled by process {other.pid} on "):
        await ScalerLease(connection, POOL).take()


async def test_a_lease_of_one_that_was_killed_is_free_at_once_and_its_workers_are_known(
    connection: Connection, other
) -> None:
    other.kill()  # its parent has not asked yet what became of it
    lease = ScalerLease(connection, POOL)
    async with asyncio.timeout(5):
        while True:
            try:
                await lease.take()
                break
            except PoolTaken:
                await asyncio.sleep(0.01)  # a signal takes a moment
    assert await lease.orphans() == {"decode-0-abc": "decode"}
    await lease.leave("decode-0-abc")
    assert await lease.orphans() == {}


async def test_a_lease_of_another_machine_is_its_own_and_its_workers_are_left_to_their_leases(
    connection: Connection,
) -> None:
    far = '{"machine":"elsewhere","pid":1,"began":"7","host":"far"}'
    await connection.command("SET", KEYS.scaler(), far)
    lease = ScalerLease(connection, POOL)
    with pytest.raises(PoolTaken, match="process 1 on far"):
        await lease.take()
    await connection.command("DEL", KEYS.scaler())
    await connection.command("HSET", KEYS.crew(), "decode-0-abc", f"decode {far}")
    await lease.take()
    assert await lease.orphans() == {}
    assert await connection.command("EXISTS", KEYS.crew()) == 0


async def test_workers_of_a_process_that_lives_stay_its_own(connection: Connection, other) -> None:
    await connection.command("DEL", KEYS.scaler())  # it did not renew for long, but it lets its workers go all the same
    lease = ScalerLease(connection, POOL)
    await lease.take()
    assert await lease.orphans() == {}
    other.kill()
    async with asyncio.timeout(5):
        while True:
            if await lease.orphans() == {"decode-0-abc": "decode"}:
                break
            await asyncio.sleep(0.01)


async def test_a_lease_is_renewed_by_taking_it_and_given_up_by_its_holder_alone(connection: Connection, other) -> None:
    lease = ScalerLease(connection, POOL)
    await lease.give_up()
    assert await connection.command("EXISTS", KEYS.scaler()) == 1
    await connection.command("DEL", KEYS.scaler())
    await lease.take()
    await lease.take()
    assert 0 < await connection.command("PTTL", KEYS.scaler()) <= 10_000
    await lease.give_up()
    await lease.give_up()
    assert await connection.command("EXISTS", KEYS.scaler()) == 0


async def test_a_decision_is_counted_and_told_once_however_often_it_is_said(connection: Connection) -> None:
    lease = ScalerLease(connection, POOL)
    await lease.take()
    events = await listen(connection, [POOL])
    await lease.tell(UP, 1000)
    await lease.tell(UP, 1000)
    said = await scaling(connection)
    assert (said["desired:prefill"], said["desired:decode"], said["why:decode"]) == ("1", "2", "much to do")
    assert (said["ups:decode"], said.get("ups:prefill"), said.get("downs:decode")) == ("1", None, None)
    await lease.tell(Decision(UP.prefill, StageDecision(2, 0, "nothing to do"), Memory()), 2000)
    assert (await scaling(connection))["downs:decode"] == "1"
    told = [await anext(events) for _ in range(2)]
    assert [(pool, event.type, event.stage, event.detail) for pool, event in told] == [
        (POOL, "stage-scaled", "decode", "0 -> 2: much to do"),
        (POOL, "stage-scaled", "decode", "2 -> 0: nothing to do"),
    ]


async def test_a_decision_of_one_that_has_lost_the_pool_is_not_taken(connection: Connection, other) -> None:
    with pytest.raises(PoolTaken):
        await ScalerLease(connection, POOL).tell(UP, 1000)
    assert await scaling(connection) == {}
