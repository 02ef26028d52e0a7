"""What every transfer must do, run against every implementation in `TRANSFERS`."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pipeline.errors import KVLost, TransferError, WireError
from pipeline.protocol import KVHandle
from tests.contract.transfer_blocks import ARENA, KINDS, LAYOUT, SLAB, TRANSFERS, Bytes, Factory, Sink
from workers.transfer import Transfer

MIB = 1_048_576
SIZES = [0, 1, 4095, SLAB - 1, SLAB, SLAB + 1, 5 * SLAB + 7, MIB, MIB + 1, ARENA]


@pytest.fixture(params=KINDS)
def factory(request: pytest.FixtureRequest) -> Factory:
    return TRANSFERS[request.param]


@pytest.fixture
async def owner(factory: Factory, tmp_path: Path):
    transfer = factory(tmp_path, "prefill@host.1")
    await transfer.start()
    yield transfer
    await transfer.close()


@pytest.fixture
async def reader(factory: Factory, tmp_path: Path):
    transfer = factory(tmp_path, "decode@host.1", exports=False)
    await transfer.start()
    yield transfer
    await transfer.close()


async def fetched(reader: Transfer, handle: KVHandle) -> Sink:
    sink = Sink(handle.nbytes, layout=handle.layout)
    await reader.fetch(handle, sink)
    return sink


async def lost(reader: Transfer, handle: KVHandle, sink: Sink | None = None) -> str:
    with pytest.raises(KVLost) as error:
        await reader.fetch(handle, sink or Sink(handle.nbytes, layout=handle.layout))
    assert handle.id in str(error.value)
    return error.value.reason


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Held(Bytes):
    """Blocks whose gather, which must run in a thread, waits until it is let go."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.go = threading.Event()
        self.ended = False

    def gather(self, out: memoryview) -> None:
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.go.wait(60)
        super().gather(out)
        self.ended = True


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("nbytes", SIZES)
async def test_bytes_arrive_as_they_left(factory: Factory, tmp_path: Path, reader: Transfer, nbytes: int, verify: bool):
    owner = factory(tmp_path, "prefill", verify=verify)
    await owner.start()
    blocks = Bytes(nbytes, seed=nbytes)
    handle = await owner.export(blocks)
    sink = await fetched(reader, handle)
    assert np.array_equal(sink.data, blocks.data)
    assert (handle.digest is not None) == verify
    assert (handle.owner, handle.request_id, handle.layout, handle.nbytes) == ("prefill", "r1", LAYOUT, nbytes)
    assert (owner.stats().exported_bytes_total, reader.stats().fetched_bytes_total) == (nbytes, nbytes)
    await owner.release(handle.id)
    await owner.close()


async def test_a_handle_survives_the_wire(owner: Transfer, reader: Transfer):
    handle = await owner.export(Bytes(100_000))
    for codec in (msgspec.json, msgspec.msgpack):
        assert (await fetched(reader, codec.decode(codec.encode(handle), type=KVHandle))).data.any()


async def test_a_handle_can_be_fetched_more_than_once(owner: Transfer, reader: Transfer):
    blocks = Bytes(100_000)
    handle = await owner.export(blocks)
    for _ in range(3):
        assert np.array_equal((await fetched(reader, handle)).data, blocks.data)


async def test_an_owner_can_fetch_from_itself(owner: Transfer):
    blocks = Bytes(2 * MIB)
    assert np.array_equal((await fetched(owner, await owner.export(blocks))).data, blocks.data)


async def test_release_frees_and_unknown_ids_are_ignored(owner: Transfer):
    whole = owner.stats().bytes_free
    handle = await owner.export(Bytes(3 * SLAB))
    assert (owner.stats().handles, owner.stats().bytes_free) == (1, whole - 3 * SLAB)
    for handle_id in ("no-such-handle", handle.id, handle.id):
        await owner.release(handle_id)
    assert (owner.stats().handles, owner.stats().bytes_used, owner.stats().bytes_free) == (0, 0, whole)


async def test_an_export_waits_for_room_and_keeps_its_place(owner: Transfer, reader: Transfer):
    first = await owner.export(Bytes(ARENA - SLAB, seed=1))
    order: list[str] = []

    async def export(name: str, nbytes: int, seed: int) -> KVHandle:
        handle = await owner.export(Bytes(nbytes, seed=seed))
        order.append(name)
        return handle

    large = asyncio.create_task(export("large", 8 * SLAB, 2))
    small = asyncio.create_task(export("small", SLAB, 3))  # would fit, but came later
    await settle()
    assert order == []
    await owner.release(first.id)
    handles = await asyncio.gather(large, small)
    assert order == ["large", "small"]
    for handle, seed in zip(handles, (2, 3), strict=True):
        assert np.array_equal((await fetched(reader, handle)).data, Bytes(handle.nbytes, seed=seed).data)


async def test_a_cancelled_wait_takes_nothing_and_lets_the_next_pass(owner: Transfer):
    full = await owner.export(Bytes(ARENA - SLAB))
    large = asyncio.create_task(owner.export(Bytes(2 * SLAB)))
    small = asyncio.create_task(owner.export(Bytes(SLAB)))
    await settle()
    large.cancel()
    await owner.release((await small).id)
    await owner.release(full.id)
    assert large.cancelled()
    assert owner.stats().bytes_used == 0


async def test_what_can_never_fit_is_refused(owner: Transfer):
    with pytest.raises(TransferError, match=r"never fit.*arena_bytes"):
        await owner.export(Bytes(ARENA + 1))
    assert owner.stats().bytes_used == 0


async def test_a_gather_that_fails_leaves_nothing(owner: Transfer):
    class Broken(Bytes):
        def gather(self, out: memoryview) -> None:
            raise ValueError("the engine failed")

    for nbytes in (10, 2 * MIB):
        with pytest.raises(ValueError, match="the engine failed"):
            await owner.export(Broken(nbytes))
    assert (owner.stats().handles, owner.stats().bytes_used) == (0, 0)


async def test_another_layout_or_size_is_refused_untouched(owner: Transfer, reader: Transfer):
    handle = await owner.export(Bytes(1000))
    for sink in (Sink(1000, layout="other"), Sink(999), Sink(1001)):
        assert await lost(reader, handle, sink) == "layout"
        assert not sink.touched


async def test_a_handle_of_another_transfer_is_refused(owner: Transfer, reader: Transfer):
    handle = await owner.export(Bytes(10))
    with pytest.raises(WireError, match="other"):
        await reader.fetch(msgspec.structs.replace(handle, transfer="other"), Sink(10))


async def test_a_released_handle_is_of_an_old_generation(owner: Transfer, reader: Transfer):
    old = await owner.export(Bytes(3 * SLAB, seed=1))
    await owner.release(old.id)
    sink = Sink(old.nbytes)
    assert await lost(reader, old, sink) == "generation"
    assert not sink.touched
    new = await owner.export(Bytes(3 * SLAB, seed=2))  # the same memory again
    assert await lost(reader, old) == "generation"
    assert np.array_equal((await fetched(reader, new)).data, Bytes(3 * SLAB, seed=2).data)


async def test_memory_used_again_below_a_longer_handle_is_seen(owner: Transfer, reader: Transfer):
    old = await owner.export(Bytes(4 * SLAB))
    await owner.release(old.id)
    await owner.export(Bytes(SLAB))
    assert await lost(reader, old) == "generation"


async def test_release_and_reuse_in_the_middle_of_a_copy_never_give_other_bytes(owner: Transfer, reader: Transfer):
    loop = asyncio.get_running_loop()
    handle = await owner.export(Bytes(2 * MIB, seed=1))

    async def replace() -> None:
        await owner.release(handle.id)
        await owner.export(Bytes(2 * MIB, seed=2))

    class Slow(Sink):
        def scatter(self, data: memoryview) -> None:
            asyncio.run_coroutine_threadsafe(replace(), loop).result(60)
            super().scatter(data)

    blocks, sink = Bytes(2 * MIB, seed=1), Slow(handle.nbytes)
    assert await lost_or_right(reader, handle, blocks, sink) in ("generation", "right")  # right: it copied a copy


async def test_a_wrong_digest_is_refused_untouched(owner: Transfer, reader: Transfer):
    handle = await owner.export(Bytes(5000))
    sink = Sink(5000)
    assert await lost(reader, msgspec.structs.replace(handle, digest="0" * 32), sink) == "digest"
    assert not sink.touched


async def test_the_loop_is_free_during_a_long_copy(owner: Transfer):
    blocks = Held(2 * MIB)
    export = asyncio.create_task(owner.export(blocks))
    await blocks.begun.wait()  # would never be, if gather held the loop
    blocks.go.set()
    await export


async def test_a_cancelled_export_frees_its_memory_only_after_the_copy(owner: Transfer):
    blocks = Held(2 * MIB)
    export = asyncio.create_task(owner.export(blocks))
    await blocks.begun.wait()
    for _ in range(3):
        export.cancel()
        await settle()
        assert not export.done()
        assert owner.stats().bytes_used == 2 * MIB
    blocks.go.set()
    with pytest.raises(asyncio.CancelledError):
        await export
    assert blocks.ended
    assert (owner.stats().handles, owner.stats().bytes_used) == (0, 0)


async def test_a_cancelled_fetch_ends_only_after_the_copy(owner: Transfer, reader: Transfer):
    loop, begun, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    class Slow(Sink):
        def scatter(self, data: memoryview) -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go.wait(60)
            super().scatter(data)

    sink = Slow(2 * MIB)
    fetch = asyncio.create_task(reader.fetch(await owner.export(Bytes(2 * MIB)), sink))
    await begun.wait()
    fetch.cancel()
    await settle()
    assert not fetch.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    assert sink.touched


async def test_close_with_exports_outstanding(factory: Factory, tmp_path: Path, reader: Transfer):
    owner = factory(tmp_path, "prefill")
    await owner.start()
    known = await owner.export(Bytes(100))
    assert (await fetched(reader, known)).touched
    unread = await owner.export(Bytes(ARENA - SLAB))
    waiting = [asyncio.create_task(owner.export(Bytes(2 * SLAB))) for _ in range(2)]
    await settle()
    await owner.close()
    await owner.close()
    for task in waiting:
        with pytest.raises(TransferError, match="closed"):
            await task
    assert [await lost(reader, handle) for handle in (known, unread)] == ["gone", "gone"]
    await owner.release(known.id)
    assert owner.stats().handles == 0


async def test_close_waits_for_a_copy_that_runs(factory: Factory, tmp_path: Path):
    owner = factory(tmp_path, "prefill")
    await owner.start()
    blocks = Held(2 * MIB)
    export = asyncio.create_task(owner.export(blocks))
    await blocks.begun.wait()
    close = asyncio.create_task(owner.close())
    await settle()
    assert not close.done()
    blocks.go.set()
    await close
    with pytest.raises(TransferError, match="closed"):
        await export


async def test_not_started_and_closed_are_said(factory: Factory, tmp_path: Path):
    transfer = factory(tmp_path, "prefill")
    with pytest.raises(TransferError, match="not started"):
        await transfer.export(Bytes(1))
    await transfer.start()
    handle = await transfer.export(Bytes(1))
    await transfer.close()
    for call in (transfer.export(Bytes(1)), transfer.fetch(handle, Sink(1))):
        with pytest.raises(TransferError, match="closed"):
            await call


async def test_a_transfer_that_only_fetches_refuses_to_export(reader: Transfer):
    with pytest.raises(TransferError, match="only fetches"):
        await reader.export(Bytes(1))
    assert reader.stats().bytes_free == 0


@pytest.mark.parametrize("seed", range(4))
async def test_many_at_once(factory: Factory, tmp_path: Path, owner: Transfer, reader: Transfer, seed: int):
    """Exports, fetches and releases of all sizes interleave; each fetch gives the bytes of its own export or says why not."""
    draw = random.Random(seed)
    outcomes = {"fetched": 0, "generation": 0}

    async def one(number: int) -> None:
        blocks = Bytes(int(2 ** draw.uniform(0, 21)), seed=number, request_id=f"r{number}")
        handle = await owner.export(blocks)
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
        assert np.array_equal((await fetched(reader, handle)).data, blocks.data)
        outcomes["fetched"] += 1
        late = asyncio.create_task(lost_or_right(reader, handle, blocks))
        if draw.random() < 0.5:
            await asyncio.sleep(0)
        await owner.release(handle.id)
        outcomes["generation"] += await late == "generation"

    await asyncio.gather(*(one(number) for number in range(100)))
    assert outcomes["fetched"] == 100
    assert outcomes["generation"] > 0
    assert (owner.stats().handles, owner.stats().bytes_used) == (0, 0)


async def lost_or_right(reader: Transfer, handle: KVHandle, blocks: Bytes, sink: Sink | None = None) -> str:
    sink = sink or Sink(handle.nbytes)
    try:
        await reader.fetch(handle, sink)
    except KVLost as error:
        return error.reason
    assert np.array_equal(sink.data, blocks.data)
    return "right"
