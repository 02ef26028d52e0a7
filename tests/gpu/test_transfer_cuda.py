"""Blocks of GPUs by every way: byte for byte, between processes that see one GPU each, and what happens when the owner is gone."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import torch

from benchmarks.gpu_transfer import Blocks, Owner, Sink, settings_of
from pipeline.errors import KVLost
from pipeline.protocol import KVHandle
from tests.contract.engines import require_cuda
from workers.transfers.block_transfer import BlockTransfer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TOKENS = (1, 16, 17, 511, 8192)


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Of the last GPU; the owners take the first."""
    require_cuda()
    return Blocks(torch.cuda.device_count() - 1)


@pytest.fixture(params=["auto", "cuda_ipc", "shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def place() -> Iterator[Path]:
    """Shared memory: files on a disk cannot be pinned."""
    with TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


@pytest.fixture
def owner(kind: str, place: Path) -> Iterator[Owner]:
    require_cuda()
    with Owner(kind, str(place), "0") as owner:
        yield owner


@pytest.fixture
async def reader(kind: str, blocks: Blocks, place: Path) -> AsyncIterator[BlockTransfer]:
    transfer = BlockTransfer(settings_of(kind, str(place)), "reader", exports=False)
    await transfer.start(blocks.device.index)
    yield transfer
    await transfer.close()


async def fetch(reader: BlockTransfer, blocks: Blocks, handle: KVHandle, seed: int) -> bool:
    """Whether every byte arrived."""
    target = blocks.choose(handle.num_tokens, seed + 1000)
    await reader.fetch(handle, Sink(blocks.memory, target))
    return blocks.holds(target, seed)


async def lost(reader: BlockTransfer, blocks: Blocks, handle: KVHandle) -> str:
    with pytest.raises(KVLost) as error:
        await fetch(reader, blocks, handle, 0)
    return error.value.reason


async def test_every_byte_arrives(kind: str, owner: Owner, reader: BlockTransfer, blocks: Blocks) -> None:
    for seed, tokens in enumerate(TOKENS):
        handle, _ = owner.export(tokens, seed)
        assert await fetch(reader, blocks, handle, seed), f"{tokens} tokens"
        owner.release(handle)
    way = "cuda_ipc" if kind == "auto" else kind
    assert {way: used.handles for way, used in reader.stats().fetched.items()} == {way: len(TOKENS)}


async def test_several_at_once(owner: Owner, reader: BlockTransfer, blocks: Blocks) -> None:
    handles = [owner.export(tokens, seed)[0] for seed, tokens in enumerate((300, 500, 700))]
    counts = [handle.num_blocks for handle in handles]
    chosen = iter(blocks.choose(1600, 7))
    targets = [list(itertools.islice(chosen, count)) for count in counts]
    sinks = [Sink(blocks.memory, target) for target in targets]
    await asyncio.gather(*(reader.fetch(handle, sink) for handle, sink in zip(handles, sinks, strict=True)))
    assert all(blocks.holds(target, seed) for seed, target in enumerate(targets))


async def test_released_is_lost(owner: Owner, reader: BlockTransfer, blocks: Blocks) -> None:
    handle, _ = owner.export(100, 0)
    owner.release(handle)
    assert await lost(reader, blocks, handle) in ("generation", "gone")
    other, _ = owner.export(100, 1)  # the same place
    assert await lost(reader, blocks, handle) in ("generation", "gone")
    assert await fetch(reader, blocks, other, 1)


@pytest.mark.parametrize("kind", ["auto", "cuda_ipc"], indirect=True)
async def test_memory_of_a_dead_owner_is_not_touched(owner: Owner, reader: BlockTransfer, blocks: Blocks) -> None:
    handle, _ = owner.export(100, 0)
    assert await fetch(reader, blocks, handle, 0)
    os.kill(owner.process.pid, signal.SIGKILL)
    owner.process.wait()
    assert await lost(reader, blocks, handle) == "gone"
    blocks.write([0], 3)
    assert blocks.holds([0], 3), "CUDA still works here"


@pytest.mark.parametrize("kind", ["auto"], indirect=True)
@pytest.mark.parametrize("way", ["shm", "tcp"])
async def test_who_cannot_open_gpu_memory_has_it_put_into_host_memory(
    owner: Owner, blocks: Blocks, place: Path, way: str
) -> None:
    """As where the GPUs do not reach each other, or the reader is on another host."""
    handle, _ = owner.export(511, 4)
    theirs = place if way == "shm" else place / "elsewhere"
    theirs.mkdir(exist_ok=True)
    offers = [offer for offer in handle.params["offers"] if offer["way"] != "cuda_ipc"]
    without = msgspec.structs.replace(handle, params={"offers": offers})
    reader = BlockTransfer(settings_of("auto", str(theirs)), "reader", exports=False)
    await reader.start(blocks.device.index)
    for _ in range(2):
        assert await fetch(reader, blocks, without, 4)
    assert reader.stats().fetched[way].handles == 2
    owner.release(handle)
    assert await lost(reader, blocks, without) == "generation"
    await reader.close()
