"""Several ways in one handle: which one is taken, when the next one is tried, and what is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.config import TcpSettings
from pipeline.errors import KVLost, TransferError, WireError
from pipeline.protocol import KVHandle
from tests.contract.transfer_blocks import TCP, Bytes, Kind, Sink, outcome, running
from workers.transfers.arena import remove_orphans
from workers.transfers.block_transfer import BlockTransfer

started = partial(running, "auto")
MIB = 1_048_576


def elsewhere(place: Path) -> Path:
    """The shared memory of another host."""
    other = place / "elsewhere"
    other.mkdir()
    return other


def ways_used(transfer: BlockTransfer) -> dict[str, int]:
    return {way: fetched.handles for way, fetched in transfer.stats().fetched.items()}


def with_offers(handle: KVHandle, offers: Any) -> KVHandle:
    return msgspec.structs.replace(handle, params={"offers": offers})


def offer(handle: KVHandle, way: str, **changes: Any) -> dict[str, Any]:
    """The offer of that way, with some of its parameters changed."""
    (found,) = (offer for offer in handle.params["offers"] if offer["way"] == way)
    return {"way": way, "params": found["params"] | changes}


async def test_the_wire_form_of_each_kind(tmp_path: Path):
    """That of `shm` is what workers read before there were offers; `auto` they refuse by the name of the transfer."""
    shm, tcp = {"arena", "first", "count", "generation"}, {"host", "port", "key", "generation"}
    forms: dict[Kind, Any] = {"shm": shm, "tcp": tcp}
    for kind, form in forms.items():
        async with running(kind, tmp_path) as owner:
            handle = await owner.export(Bytes(10))
            assert (handle.transfer, set(handle.params)) == (kind, form)
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        assert (handle.transfer, set(handle.params)) == ("auto", {"offers"})
        ways = [(offer["way"], set(offer["params"])) for offer in handle.params["offers"]]
        assert ways == [("shm", shm), ("tcp", tcp)]


async def test_shared_memory_where_both_see_it(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        for _ in range(3):
            assert await outcome(reader, await owner.export(Bytes(100_000))) == "ok"
        fetched = reader.stats().fetched["shm"]
        assert (ways_used(reader), fetched.nbytes) == ({"shm": 3}, 300_000)
        assert fetched.seconds > 0
        assert owner.stats().fetched == {}


async def test_tcp_where_the_arena_is_not_to_be_seen(tmp_path: Path):
    async with started(tmp_path) as owner, started(elsewhere(tmp_path), "decode", exports=False) as reader:
        blocks = Bytes(2 * MIB)
        handle = await owner.export(blocks)
        sink = Sink(handle.nbytes)
        await reader.fetch(handle, sink)
        assert np.array_equal(sink.data, blocks.data)
        assert ways_used(reader) == {"tcp": 1}


async def test_a_file_of_the_same_name_is_not_the_same_host(tmp_path: Path):
    """A directory that two hosts share by accident, or a copy of one: what is not the arena is not read."""
    other = elsewhere(tmp_path)
    async with started(tmp_path) as owner, started(other, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        copy = other / offer(handle, "shm")["params"]["arena"]
        copy.touch(0o600)
        copy.write_bytes(bytes(8192))
        assert await outcome(reader, handle) == "ok"
        assert ways_used(reader) == {"tcp": 1}


async def test_a_void_handle_is_tried_by_no_other_way(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(1000))
        tcp = offer(handle, "tcp")
        assert await outcome(reader, with_offers(handle, [offer(handle, "shm", generation=9), tcp])) == "generation"
        assert await outcome(reader, with_offers(handle, [offer(handle, "shm", first=63, count=2), tcp])) == "gone"
        assert await outcome(reader, with_offers(handle, [offer(handle, "shm", first="0"), tcp])) == "wire"
        assert await outcome(reader, msgspec.structs.replace(handle, digest="0" * 32)) == "digest"
        assert ways_used(reader) == {}
        await owner.release(handle.id)
        assert await outcome(reader, handle) == "generation"


async def test_where_no_way_works_each_one_says_why(tmp_path: Path):
    async with started(elsewhere(tmp_path), "decode", exports=False) as reader:
        async with started(tmp_path) as owner:
            handle = await owner.export(Bytes(10))
            foreign = {"way": "nixl", "params": {"agent": "x"}}
            handle = with_offers(handle, [foreign, *handle.params["offers"]])
            assert await outcome(reader, handle) == "ok"
        with pytest.raises(KVLost) as error:
            await reader.fetch(handle, Sink(10))
    assert error.value.reason == "gone"
    for part in (
        handle.id,
        "nixl: not in use here",
        "shm: arena baton-prefill-",
        "tcp: 127.0.0.1:",
        "Connect call failed",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(("reads", "used"), [("shm", {"shm": 1}), ("tcp", {"tcp": 1}), ("auto", {"tcp": 1})])
async def test_a_reader_of_one_kind_takes_its_way_out_of_several(tmp_path: Path, reads: Kind, used: dict[str, int]):
    async with started(tmp_path) as owner, running(reads, tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        offers = [offer(handle, "tcp"), offer(handle, "shm")]  # the order is the owner's to say
        assert await outcome(reader, with_offers(handle, offers)) == "ok"
        assert ways_used(reader) == used


@pytest.mark.parametrize(("exports", "reads"), [("shm", "tcp"), ("tcp", "shm")])
async def test_a_way_that_is_not_in_use_here(tmp_path: Path, exports: Kind, reads: Kind):
    async with running(exports, tmp_path) as owner, running(reads, tmp_path, "decode", exports=False) as reader:
        handle = await owner.export(Bytes(10))
        assert await outcome(reader, handle) == "gone"
        async with started(tmp_path, "other", exports=False) as other:
            assert await outcome(other, handle) == "ok"


@pytest.mark.parametrize(
    "offers",
    [None, [], {}, "shm", [None], [{}], [{"way": "shm"}], [{"way": 1, "params": {}}], [{"way": "shm", "params": 1}],
     [{"way": "shm", "params": {}, "more": 1}], [{"way": "shm", "params": {}}], [{"way": "x", "params": {}}] * 9],
    ids=str,
)  # fmt: skip
async def test_hostile_offers(tmp_path: Path, offers: Any):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        with pytest.raises(WireError):
            await owner.fetch(with_offers(handle, offers), Sink(10))
        with pytest.raises(WireError):
            await owner.fetch(msgspec.structs.replace(handle, params={}), Sink(10))


async def test_a_reader_without_shared_memory_goes_on_without_it(tmp_path: Path):
    async with started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        async with started(tmp_path / "nowhere", "decode", exports=False) as reader:
            assert await outcome(reader, handle) == "ok"
            assert ways_used(reader) == {"tcp": 1}
        with pytest.raises(TransferError, match=r"transfer.dir = .*nowhere"):
            async with running("shm", tmp_path / "nowhere", "decode", exports=False):
                pass


async def test_a_port_that_cannot_be_had_is_no_reason_to_go_on_without(tmp_path: Path):
    """A setting that is wrong is said, also where another way would do."""
    with pytest.raises(TransferError, match=r"transfer.tcp.host"):
        async with started(tmp_path, tcp=TcpSettings(host="203.0.113.7")):
            pass
    assert len(remove_orphans(tmp_path)) == 0


async def test_an_owner_that_died_is_still_read_where_its_memory_is(tmp_path: Path):
    quick = msgspec.structs.replace(TCP, timeout_s=0.3)
    async with started(tmp_path, "decode", exports=False, tcp=quick) as reader, started(tmp_path) as owner:
        handle = await owner.export(Bytes(10))
        unreachable = with_offers(handle, [offer(handle, "tcp", port=1), offer(handle, "shm")])
        assert await outcome(reader, unreachable) == "ok"
        assert ways_used(reader) == {"shm": 1}
