"""Blocks as plain numpy bytes, and the implementations that the transfer suite runs against."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config import NixlSettings, TcpSettings, TransferSettings
from pipeline.errors import KVLost, WireError
from pipeline.protocol import KVHandle
from workers.transfer import Transfer
from workers.transfers.block_transfer import BlockTransfer

ROOT = Path(__file__).parents[2]
LAYOUT = "test-layout"
SLAB = 65_536
ARENA = 64 * SLAB  # 4 MiB: exports of more than a quarter of it are copied in a thread
TCP = TcpSettings(staging_bytes=2 * ARENA)
NIXL = NixlSettings(staging_bytes=3 * ARENA, timeout_s=5.0)

Kind = Literal["auto", "shm", "nixl", "tcp"]


class Bytes:
    """A `BlockSource` of random bytes, different for each seed."""

    def __init__(self, nbytes: int, seed: int = 0, *, layout: str = LAYOUT, request_id: str = "r1") -> None:
        self.device = None
        self.request_id = request_id
        self.layout = layout
        self.num_tokens = nbytes
        self.num_blocks = 1
        self.nbytes = nbytes
        self.cached_tokens = 0
        self.data: npt.NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)

    def gather(self, out: memoryview) -> None:
        assert (out.format, out.nbytes, out.readonly) == ("B", self.nbytes, False)
        np.copyto(np.frombuffer(out, dtype=np.uint8), self.data)


class Sink:
    """A `BlockSink` that keeps what it was given."""

    def __init__(self, nbytes: int, *, layout: str = LAYOUT) -> None:
        self.device = None
        self.layout = layout
        self.nbytes = nbytes
        self.touched = False
        self.data: npt.NDArray[np.uint8] = np.zeros(nbytes, dtype=np.uint8)

    def scatter(self, data: memoryview) -> None:
        assert (data.format, data.nbytes) == ("B", self.nbytes)
        self.touched = True
        np.copyto(self.data, np.frombuffer(data, dtype=np.uint8))


class Factory(Protocol):
    """Makes a transfer that is not started. All that one test makes can reach one another through `place`."""

    def __call__(self, place: Path, owner: str, *, verify: bool = True, exports: bool = True) -> Transfer: ...


def transfer_of(
    kind: Kind, place: Path, owner: str, *, verify: bool = True, exports: bool = True, tcp: TcpSettings | None = None,
    nixl: NixlSettings = NIXL, arena_bytes: int = ARENA,
) -> BlockTransfer:  # fmt: skip
    """A transfer of a kind, small. `place` is the folder of its shared memory."""
    settings = TransferSettings(
        kind=kind,
        dir=str(place),
        arena_bytes=arena_bytes,
        slab_bytes=SLAB,
        verify=verify,
        tcp=tcp or TCP,
        nixl=nixl,
    )
    return BlockTransfer(settings, owner, exports=exports)


requires_nixl = [
    pytest.mark.nixl,
    pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None, reason="NIXL is not installed here: make test-vllm has it"
    ),
]

shm = partial(transfer_of, "shm")
tcp = partial(transfer_of, "tcp")
TRANSFERS: dict[str, Factory] = {kind: partial(transfer_of, kind) for kind in ("shm", "tcp", "nixl", "auto")}
KINDS = [pytest.param(kind, marks=requires_nixl if kind == "nixl" else ()) for kind in TRANSFERS]


@asynccontextmanager
async def running(
    kind: Kind, place: Path, owner: str = "prefill", *, verify: bool = True, exports: bool = True,
    tcp: TcpSettings | None = None, nixl: NixlSettings = NIXL, arena_bytes: int = ARENA,
) -> AsyncIterator[BlockTransfer]:  # fmt: skip
    """A transfer that is started, and closed at the end."""
    transfer = transfer_of(
        kind, place, owner, verify=verify, exports=exports, tcp=tcp, nixl=nixl, arena_bytes=arena_bytes
    )
    await transfer.start()
    try:
        yield transfer
    finally:
        await transfer.close()


@asynccontextmanager
async def owner_process(
    kind: Kind, place: Path, nbytes: int, seed: int
) -> AsyncIterator[tuple[asyncio.subprocess.Process, KVHandle]]:
    """A real process with one export in it."""
    arguments = ["-m", "tests.contract.transfer_owner", kind, str(place), str(nbytes), str(seed)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT, **pipes)
    try:
        assert process.stdout is not None
        yield process, msgspec.json.decode(await process.stdout.readline(), type=KVHandle)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def outcome(reader: Transfer, handle: KVHandle) -> str:
    """How a fetch ends: ok, wire, or the reason of KVLost. Everything else fails the test."""
    sink = Sink(handle.nbytes, layout=handle.layout)
    try:
        await reader.fetch(handle, sink)
    except KVLost as error:
        return error.reason
    except WireError:
        return "wire"
    return "ok"


def altered(handle: KVHandle, **params: Any) -> KVHandle:
    """The handle with some of its `params` changed."""
    return msgspec.structs.replace(handle, params=handle.params | params)
