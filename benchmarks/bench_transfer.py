"""The shm transfer beside plain copies of the same size, in the same run: `python -m benchmarks.bench_transfer`.

Two processes, as in service: this one exports, a child fetches. Each copies between its own private memory and the arena
once. The reference of each is `numpy.copyto` between two private buffers in the same process. All private buffers rotate
through pools larger than the last-level cache, for the reference and the transfer alike; pools and arena are touched before
the clock starts; each process stays on a core of its own; reference and transfer alternate, and medians are reported. Rows:

- `copy`: the time inside of `gather` or `scatter`, so the memory itself; the target is 0.70 of the reference
- `call`: the whole `export` or `fetch`: handle, generations, and for long copies the hop to a thread and back
- `end to end`: both calls and the release; its reference is two plain copies, one in each process
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.config import TransferSettings
from pipeline.protocol import KVHandle
from workers.transfers.block_transfer import BlockTransfer

KIB, MIB = 1024, 1_048_576
SIZES = {"256 KiB": 256 * KIB, "1 MiB": MIB, "8 MiB": 8 * MIB, "64 MiB": 64 * MIB}
POOL_BYTES = 128 * MIB
TARGET = 0.70

Buffer = npt.NDArray[np.uint8]


class Pool:
    """Private memory in turn, so that no buffer is still in the cache when it comes again."""

    def __init__(self) -> None:
        self._memory: Buffer = np.ones(POOL_BYTES, dtype=np.uint8)
        self._next = 0

    def take(self, nbytes: int) -> Buffer:
        self._next = self._next if self._next + nbytes <= POOL_BYTES else 0
        self._next += nbytes
        return self._memory[self._next - nbytes : self._next]


class Blocks:
    """Source and sink over one buffer; `copy_s` is the time of the last copy alone."""

    request_id, layout, num_tokens, num_blocks, cached_tokens = "bench", "bench", 1, 1, 0

    def __init__(self, data: Buffer) -> None:
        self.data = data
        self.nbytes = data.nbytes
        self.copy_s = 0.0

    def gather(self, out: memoryview) -> None:
        self.copy_s = timed(lambda: np.copyto(np.frombuffer(out, dtype=np.uint8), self.data))

    def scatter(self, data: memoryview) -> None:
        self.copy_s = timed(lambda: np.copyto(self.data, np.frombuffer(data, dtype=np.uint8)))


def timed(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def run() -> list[dict[str, Any]]:
    """One row a figure: name, value, unit, reference (same unit, same run), ratio."""
    cores = os.sched_getaffinity(0)
    with TemporaryDirectory(dir="/dev/shm") as place:
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(target=fetch_all, args=(theirs, place))
        child.start()
        theirs.close()
        try:
            stay_on_core(0)
            return asyncio.run(export_all(ours, place))
        finally:
            os.sched_setaffinity(0, cores)
            ours.close()
            child.join()


def stay_on_core(number: int) -> None:
    """Where both processes share a core they share its cache too, and a small transfer looks twice as fast as it is."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


async def export_all(child: Connection, place: str) -> list[dict[str, Any]]:
    transfer = BlockTransfer(TransferSettings(dir=place), "bench-export")
    await transfer.start()
    pools = Pool(), Pool()
    rows = []
    for name, nbytes in SIZES.items():
        rounds = [await one_round(transfer, child, pools, nbytes) for _ in range(rounds_for(nbytes) + 3)][3:]
        rows += rows_of(name, nbytes, {key: median(round_[key] for round_ in rounds) for key in rounds[0]})
    await transfer.close()
    return rows


def rounds_for(nbytes: int) -> int:
    """About 2 GiB through each copy."""
    return max(21, min(301, 2048 * MIB // nbytes))


async def one_round(
    transfer: BlockTransfer, child: Connection, pools: tuple[Pool, Pool], nbytes: int
) -> dict[str, float]:
    """Seconds of each part."""
    source, target = (pool.take(nbytes) for pool in pools)
    memcpy_s = timed(lambda: np.copyto(target, source))
    blocks = Blocks(pools[0].take(nbytes))
    start = perf_counter()
    handle = await transfer.export(blocks)
    export_s = perf_counter() - start
    child.send_bytes(msgspec.msgpack.encode(handle))
    theirs = msgspec.msgpack.decode(child.recv_bytes(), type=dict[str, float])
    release_s = perf_counter()
    await transfer.release(handle.id)
    release_s = perf_counter() - release_s
    ours = {"memcpy": memcpy_s, "export copy": blocks.copy_s, "export call": export_s, "release": release_s}
    return ours | theirs


def fetch_all(parent: Connection, place: str) -> None:
    """The child: fetches what it is told, until the parent hangs up."""

    async def serve() -> None:
        transfer = BlockTransfer(TransferSettings(dir=place), "bench-fetch", exports=False)
        await transfer.start()
        pools = Pool(), Pool()
        while True:
            try:
                handle = msgspec.msgpack.decode(parent.recv_bytes(), type=KVHandle)
            except EOFError:
                break
            source, target = (pool.take(handle.nbytes) for pool in pools)
            memcpy_s = timed(lambda source=source, target=target: np.copyto(target, source))
            blocks = Blocks(pools[1].take(handle.nbytes))
            start = perf_counter()
            await transfer.fetch(handle, blocks)
            fetch_s = perf_counter() - start
            times = {"fetch memcpy": memcpy_s, "fetch copy": blocks.copy_s, "fetch call": fetch_s}
            parent.send_bytes(msgspec.msgpack.encode(times))
        await transfer.close()

    stay_on_core(1)
    asyncio.run(serve())


def rows_of(size: str, nbytes: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    both_s = seconds["export call"] + seconds["fetch call"] + seconds["release"]
    pairs = {
        "export copy": (seconds["export copy"], seconds["memcpy"]),
        "fetch copy": (seconds["fetch copy"], seconds["fetch memcpy"]),
        "export call": (seconds["export call"], seconds["memcpy"]),
        "fetch call": (seconds["fetch call"], seconds["fetch memcpy"]),
        "end to end": (both_s, seconds["memcpy"] + seconds["fetch memcpy"]),
    }
    return [
        {
            "name": f"shm {size} {part}",
            "value": nbytes / ours / 1e9,
            "unit": "GB/s",
            "reference": nbytes / plain / 1e9,
            "ratio": plain / ours,
        }
        for part, (ours, plain) in pairs.items()
    ]


def main() -> None:
    print(f"{'':26}{'shm':>9}{'plain copy':>12}{'ratio':>8}    load {os.getloadavg()[0]:.1f}")
    for row in run():
        met = "" if "copy" not in row["name"] else "  ok" if row["ratio"] >= TARGET else f"  below {TARGET:.2f}"
        print(f"{row['name']:26}{row['value']:9.2f}{row['reference']:12.2f}{row['ratio']:8.2f}  {row['unit']}{met}")


if __name__ == "__main__":
    main()
