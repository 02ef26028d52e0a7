"""What only the way by NIXL can get wrong: its package, agents that die or hang, what is written late, handles that lie."""

from __future__ import annotations

import asyncio
import base64
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from pipeline.config import NixlSettings
from pipeline.errors import KVLost, TransferError
from pipeline.protocol import KVHandle
from tests.contract.transfer_blocks import (
    ARENA,
    NIXL,
    SLAB,
    Bytes,
    Sink,
    altered,
    outcome,
    owner_process,
    requires_nixl,
    running,
)
from workers.transfer import Transfer
from workers.transfers.block_transfer import BlockTransfer
from workers.transfers.ways.nixl import peers, way

pytestmark = requires_nixl

MIB = 1_048_576
QUICK = msgspec.structs.replace(NIXL, timeout_s=0.5)

started = partial(running, "nixl")


@pytest.fixture
def between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but TCP, as between hosts without RDMA: on one host NIXL reads the other process's memory, alive or not."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def inside(transfer: BlockTransfer) -> way.NixlWay:
    """The way of a transfer, to see what it holds."""
    found = transfer._ways["nixl"]
    assert isinstance(found, way.NixlWay)
    return found


async def why(reader: Transfer, handle: KVHandle) -> str:
    """The words of `KVLost` gone."""
    with pytest.raises(KVLost) as error:
        await reader.fetch(handle, Sink(handle.nbytes))
    assert error.value.reason == "gone"
    return str(error.value)


async def test_what_a_handle_says(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "other") as other:
        handle, foreign = await owner.export(Bytes(10)), await other.export(Bytes(10))
        assert handle.transfer == "nixl"
        assert handle.params["agent"] != foreign.params["agent"]
        assert len(msgspec.json.encode(handle)) < 16_384


@pytest.mark.parametrize("transport", ["", "tcp"])
async def test_bytes_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str):
    if transport:
        monkeypatch.setenv("UCX_TLS", transport)
    nbytes = 3 * MIB + 7
    async with owner_process("nixl", tmp_path, nbytes, 3) as (_, handle), started(tmp_path, exports=False) as reader:
        for _ in range(3):
            sink = Sink(nbytes)
            await reader.fetch(handle, sink)
            assert np.array_equal(sink.data, Bytes(nbytes, seed=3).data)


async def test_a_handle_larger_than_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(way, "CHUNK_BYTES", 100_000)
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False) as reader:
        blocks = Bytes(MIB + 1)
        handle, sink = await owner.export(blocks), Sink(MIB + 1)
        await reader.fetch(handle, sink)
        assert np.array_equal(sink.data, blocks.data)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("transport", ["", "tcp"])
async def test_a_killed_owner_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool, transport: str
):
    if transport:
        monkeypatch.setenv("UCX_TLS", transport)
    async with started(tmp_path, "decode", exports=False) as reader:
        async with owner_process("nixl", tmp_path, 100_000, 1) as (process, handle):
            if is_known:
                assert await outcome(reader, handle) == "ok"
            process.kill()
            await process.wait()
            for _ in range(2):
                async with asyncio.timeout(2 * NIXL.timeout_s):
                    await why(reader, handle)
        async with owner_process("nixl", tmp_path, 100_000, 2) as (_, handle):
            assert await outcome(reader, handle) == "ok"


async def test_a_frozen_owner_is_gone_in_time_and_what_it_sends_late_meets_nobody(tmp_path: Path, between_hosts: None):
    """NIXL lets go of a read that has not ended, and yet its bytes arrive: staging memory must not be anybody else's by then."""
    nbytes = ARENA
    async with (
        owner_process("nixl", tmp_path, nbytes, 1) as (frozen, late),
        owner_process("nixl", tmp_path, nbytes, 2) as (_, other),
        started(tmp_path, "decode", exports=False, nixl=QUICK) as reader,
    ):
        staging = inside(reader)._staging
        whole = staging.nbytes_free
        assert await outcome(reader, late) == "ok"
        frozen.send_signal(signal.SIGSTOP)
        assert "did not answer for 0.5 s" in await why(reader, late)
        assert "has not answered" in await why(reader, late)  # at once, and it takes no more memory
        assert staging.nbytes_free == whole - nbytes - SLAB
        for _ in range(3):
            sink = Sink(nbytes)
            await reader.fetch(other, sink)
            assert np.array_equal(sink.data, Bytes(nbytes, seed=2).data)
        frozen.send_signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while staging.nbytes_free != whole:  # noqa: ASYNC110  # what is waited for happens in a thread
                await asyncio.sleep(0.01)
        assert await outcome(reader, late) == "ok"


async def test_a_fetch_that_is_given_up_keeps_its_memory_until_nothing_arrives(tmp_path: Path, between_hosts: None):
    async with (
        owner_process("nixl", tmp_path, ARENA, 1) as (frozen, handle),
        started(tmp_path, "decode", exports=False) as reader,
    ):
        staging = inside(reader)._staging
        whole = staging.nbytes_free
        assert await outcome(reader, handle) == "ok"
        frozen.send_signal(signal.SIGSTOP)
        fetch = asyncio.create_task(reader.fetch(handle, Sink(ARENA)))
        await asyncio.sleep(0.2)
        fetch.cancel()
        await asyncio.wait([fetch])
        assert fetch.cancelled()
        assert staging.nbytes_free < whole
        frozen.kill()  # which ends the read, too
        async with asyncio.timeout(10):
            while staging.nbytes_free != whole:  # noqa: ASYNC110  # what is waited for happens in a thread
                await asyncio.sleep(0.01)


async def test_closing_while_an_owner_hangs(tmp_path: Path, between_hosts: None):
    async with owner_process("nixl", tmp_path, MIB, 1) as (frozen, handle):
        async with started(tmp_path, "decode", exports=False, nixl=QUICK) as reader:
            assert await outcome(reader, handle) == "ok"
            frozen.send_signal(signal.SIGSTOP)
            await why(reader, handle)
            async with asyncio.timeout(10):
                await reader.close()
        frozen.send_signal(signal.SIGCONT)


def metadata(handle: KVHandle, change: Any, *, is_signed: bool) -> KVHandle:
    data = change(base64.b64decode(handle.params["metadata"]))
    check = {"check": xxhash.xxh3_128_hexdigest(data)} if is_signed else {}
    return altered(handle, metadata=base64.b64encode(data).decode(), **check)


async def test_metadata_that_are_not_whole(tmp_path: Path):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, nixl=QUICK) as reader:
        handle = await owner.export(Bytes(1000))
        for change in (
            lambda data: b"",
            lambda data: data[:20],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-5],
            lambda data: bytes(len(data)),
            lambda data: data.replace(handle.params["agent"].encode(), b"baton-" + b"0" * 32),
        ):
            assert await outcome(reader, metadata(handle, change, is_signed=False)) == "wire"
            assert await outcome(reader, handle) == "ok"
        for forge in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: bytes(len(data))):
            assert await outcome(reader, metadata(handle, forge, is_signed=True)) == "gone"
        assert await outcome(reader, altered(handle, metadata="no base64")) == "wire"
        assert await outcome(reader, altered(handle, metadata="A" * (way.MAX_METADATA_CHARS + 4))) == "wire"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"agent": "baton-" + "0" * 32}, "gone"), ({"agent": "../x"}, "wire"), ({"arena": "../x"}, "wire"),
        ({"arena": "baton-prefill-0123456789abcdef"}, "gone"), ({"base": 4096}, "gone"), ({"base": -1}, "wire"),
        ({"base": 2**63 - 1}, "gone"), ({"data": 4096}, "gone"), ({"data": 2**64}, "wire"), ({"memory": "BLOCK"}, "wire"),
        ({"memory": "VRAM"}, "gone"), ({"first": 63}, "gone"), ({"first": 2**32 - 1}, "gone"), ({"first": -1}, "wire"),
        ({"count": 0}, "wire"), ({"count": 2}, "gone"), ({"count": 2**31}, "wire"), ({"generation": 0}, "wire"),
        ({"generation": 2}, "generation"), ({"more": 1}, "wire"), ({"agent": None}, "wire"),
    ],
    ids=str,
)  # fmt: skip
async def test_handles_that_lie(tmp_path: Path, changed: dict[str, Any], expected: str):
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, nixl=QUICK) as reader:
        handle = await owner.export(Bytes(5000))
        assert await outcome(reader, altered(handle, **changed)) == expected
        assert await outcome(reader, handle) == "ok"


async def test_bytes_that_are_not_those_of_the_slabs_are_not_taken(tmp_path: Path):
    async with started(tmp_path, verify=False) as owner:
        first, second = await owner.export(Bytes(10, seed=1)), await owner.export(Bytes(10, seed=2))
        assert await outcome(owner, altered(first, data=second.params["data"])) == "gone"
        assert await outcome(owner, msgspec.structs.replace(first, nbytes=2 * SLAB)) == "gone"


async def test_a_handle_larger_than_the_staging_memory(tmp_path: Path):
    small = msgspec.structs.replace(NIXL, staging_bytes=4 * SLAB)
    async with started(tmp_path) as owner, started(tmp_path, "decode", exports=False, nixl=small) as reader:
        assert "staging_bytes" in await why(reader, await owner.export(Bytes(4 * SLAB)))
        assert await outcome(reader, await owner.export(Bytes(3 * SLAB))) == "ok"


async def test_of_many_owners_a_few_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "MAX_PEERS", 2)
    async with (
        started(tmp_path, "a") as a,
        started(tmp_path, "b") as b,
        started(tmp_path, "c") as c,
        started(tmp_path, "decode", exports=False) as reader,
    ):
        for owner in (a, b, c, a, b, c, c):
            assert await outcome(reader, await owner.export(Bytes(1000))) == "ok"
            assert len(inside(reader)._peers._peers) <= 2


async def test_without_its_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(TransferError, match=r"pip install 'baton-serve\[nixl\]'"):
        async with started(tmp_path):
            pass
    monkeypatch.setattr(way, "has_rdma", lambda: True)
    async with running("auto", tmp_path) as owner:
        ways = [offer["way"] for offer in (await owner.export(Bytes(10))).params["offers"]]
    assert ways == ["shm", "tcp"]


async def test_a_backend_that_is_not_there(tmp_path: Path):
    with pytest.raises(TransferError, match="NONE"):
        async with started(tmp_path, nixl=NixlSettings(backend="NONE")):
            pass


async def test_auto_takes_it_on_hosts_with_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for has_rdma, expected in ((True, ["shm", "nixl", "tcp"]), (False, ["shm", "tcp"])):
        monkeypatch.setattr(way, "has_rdma", lambda has_rdma=has_rdma: has_rdma)
        async with (
            running("auto", tmp_path) as owner,
            running("auto", tmp_path, "near", exports=False) as near,
            running("auto", elsewhere, "far", exports=False) as far,
        ):
            handle = await owner.export(Bytes(10))
            assert [offer["way"] for offer in handle.params["offers"]] == expected
            assert [await outcome(reader, handle) for reader in (near, far)] == ["ok", "ok"]
            assert list(near.stats().fetched) == ["shm"]
            assert list(far.stats().fetched) == ["nixl" if has_rdma else "tcp"]


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "ucx" in path.name or "nixl" in path.name}


@pytest.mark.parametrize("how", ["asked to", "killed"])
async def test_its_process_ends_and_leaves_nothing(tmp_path: Path, how: str):
    before = shared_files()
    async with owner_process("nixl", tmp_path, MIB, 1) as (process, handle):
        async with started(tmp_path, "decode", exports=False) as reader:
            assert await outcome(reader, handle) == "ok"
        if how == "killed":
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.close()
        async with asyncio.timeout(20):
            assert await process.wait() == (0 if how == "asked to" else -signal.SIGKILL)
    assert shared_files() <= before
