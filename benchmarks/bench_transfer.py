"""Transfers beside plain copies of the same size, in the same run: `python -m benchmarks.bench_transfer [shm] [tcp] [nixl]`.

Two processes, as in service: this one exports, a child fetches. All private buffers rotate through pools larger than the
last-level cache, for the reference and the transfer alike; pools and arena are touched before the clock starts; each process
stays on a core of its own; reference and transfer alternate, and medians are reported.

shm: each process copies between its own private memory and the arena once. The reference of each is `numpy.copyto` between two
private buffers in the same process.
- `copy`: the time inside of `gather` or `scatter`, so the memory itself; the target is 0.70 of the reference
- `call`: the whole `export` or `fetch`: handle, generations, and for long copies the hop to a thread and back
- `end to end`: both calls and the release; its reference is two plain copies, one in each process

tcp: the reference is a bare copy over a socket of the loopback: `sendfile` from shared memory here, `recv_into` there, nothing else.
- `fetch`: the whole `fetch`, digests and the copy into the blocks included; the target is 0.70 of the reference from 8 MiB on

nixl, where it is installed: the same, with the same reference. On one host UCX copies out of the other process's memory;
`UCX_TLS=tcp` keeps it to what it has between hosts without RDMA.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.config import NixlSettings, TransferSettings
from pipeline.protocol import KVHandle
from workers.transfers.block_transfer import BlockTransfer

KIB, MIB = 1024, 1_048_576
SIZES = {"256 KiB": 256 * KIB, "1 MiB": MIB, "8 MiB": 8 * MIB, "64 MiB": 64 * MIB, "256 MiB": 256 * MIB}
LARGEST = {"shm": 64 * MIB, "tcp": 256 * MIB, "nixl": 256 * MIB}
POOL_BYTES = {"shm": 128 * MIB, "tcp": 256 * MIB, "nixl": 256 * MIB}
ROUND_BYTES = 2048 * MIB  # about so much goes through each copy
TARGET, TARGET_FROM_BYTES = 0.70, {"shm": 0, "tcp": 8 * MIB, "nixl": 8 * MIB}

Buffer = npt.NDArray[np.uint8]
Kind = Literal["shm", "tcp", "nixl"]


class Pool:
    """Private memory in turn, so that no buffer is still in the cache when it comes again."""

    def __init__(self, nbytes: int) -> None:
        self._memory: Buffer = np.ones(nbytes, dtype=np.uint8)
        self._next = 0

    def take(self, nbytes: int) -> Buffer:
        self._next = self._next if self._next + nbytes <= len(self._memory) else 0
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


class PlainSender:
    """A thread that sends as many bytes as it is asked for, out of shared memory: the bare copy that `tcp` is compared with."""

    def __init__(self, place: str, nbytes: int) -> None:
        self._file = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
        for _ in range(nbytes // MIB):
            os.write(self._file, b"x" * MIB)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            while wanted := sock.recv(8, socket.MSG_WAITALL):
                at, nbytes = 0, int.from_bytes(wanted, "little")
                while at < nbytes:
                    at += os.sendfile(sock.fileno(), self._file, at, nbytes - at)

    def close(self) -> None:
        """The child has hung up."""
        self._thread.join()
        self._listener.close()
        os.close(self._file)


class PlainReceiver:
    """Its other end."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))

    def receive(self, into: Buffer) -> None:
        view, at = memoryview(into), 0
        self._socket.sendall(into.nbytes.to_bytes(8, "little"))
        while at < into.nbytes:
            at += self._socket.recv_into(view[at:], 0, socket.MSG_WAITALL)

    def close(self) -> None:
        self._socket.close()


def run(kinds: Sequence[Kind] = ("shm", "tcp")) -> list[dict[str, Any]]:
    """One row a figure: name, value, unit, reference (same unit, same run), ratio."""
    return [row for kind in kinds for row in run_kind(kind)]


def run_kind(kind: Kind) -> list[dict[str, Any]]:
    cores = os.sched_getaffinity(0)
    with TemporaryDirectory(dir="/dev/shm") as place:
        ours, theirs = multiprocessing.Pipe()
        plain = PlainSender(place, LARGEST[kind] if kind != "shm" else 0)
        child = multiprocessing.get_context("spawn").Process(target=fetch_all, args=(theirs, kind, place, plain.port))
        child.start()
        theirs.close()
        try:
            stay_on_core(0)
            return asyncio.run(export_all(ours, kind, place))
        finally:
            os.sched_setaffinity(0, cores)
            ours.close()
            child.join()
            plain.close()


def stay_on_core(number: int) -> None:
    """Where both processes share a core they share its cache too, and a small transfer looks twice as fast as it is."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def settings_for(kind: Kind, place: str) -> TransferSettings:
    arena_bytes = LARGEST[kind] * (4 if kind == "shm" else 1)
    nixl = NixlSettings(staging_bytes=LARGEST[kind] + MIB)  # the proof of what was read is read, too
    return TransferSettings(kind=kind, dir=place, arena_bytes=arena_bytes, nixl=nixl)


async def export_all(child: Connection, kind: Kind, place: str) -> list[dict[str, Any]]:
    transfer = BlockTransfer(settings_for(kind, place), "bench-export")
    await transfer.start()
    pools = Pool(POOL_BYTES[kind]), Pool(POOL_BYTES[kind])
    rows = []
    for name, nbytes in SIZES.items():
        if nbytes > LARGEST[kind]:
            continue
        rounds = [await one_round(transfer, child, pools, nbytes) for _ in range(rounds_for(nbytes) + 3)][3:]
        seconds = {key: median(round_[key] for round_ in rounds) for key in rounds[0]}
        rows += rows_of(kind, name, nbytes, PAIRS[kind](seconds))
    await transfer.close()
    return rows


def rounds_for(nbytes: int) -> int:
    return max(15, min(301, ROUND_BYTES // nbytes))


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
    theirs = msgspec.msgpack.decode(await asyncio.to_thread(child.recv_bytes), type=dict[str, float])
    release_s = perf_counter()
    await transfer.release(handle.id)
    release_s = perf_counter() - release_s
    ours = {"memcpy": memcpy_s, "export copy": blocks.copy_s, "export call": export_s, "release": release_s}
    return ours | theirs


def fetch_all(parent: Connection, kind: Kind, place: str, port: int) -> None:
    """The child: fetches what it is told, until the parent hangs up."""

    async def serve() -> None:
        transfer = BlockTransfer(settings_for(kind, place), "bench-fetch", exports=False)
        await transfer.start()
        plain = PlainReceiver(port)
        pools = Pool(POOL_BYTES[kind]), Pool(POOL_BYTES[kind])
        while True:
            try:
                handle = msgspec.msgpack.decode(parent.recv_bytes(), type=KVHandle)
            except EOFError:
                break
            source, target = (pool.take(handle.nbytes) for pool in pools)
            memcpy_s = timed(lambda source=source, target=target: np.copyto(target, source))
            target = pools[1].take(handle.nbytes)
            plain_s = timed(lambda target=target: plain.receive(target)) if kind != "shm" else 0.0
            blocks = Blocks(pools[1].take(handle.nbytes))
            start = perf_counter()
            await transfer.fetch(handle, blocks)
            fetch_s = perf_counter() - start
            times = {"fetch memcpy": memcpy_s, "fetch copy": blocks.copy_s, "fetch call": fetch_s, "plain": plain_s}
            parent.send_bytes(msgspec.msgpack.encode(times))
        plain.close()
        await transfer.close()

    stay_on_core(1)
    asyncio.run(serve())


class Pair(NamedTuple):
    """A part and its reference, in seconds."""

    name: str
    ours_s: float
    plain_s: float
    has_target: bool = False


def shm_pairs(seconds: dict[str, float]) -> list[Pair]:
    both_s = seconds["export call"] + seconds["fetch call"] + seconds["release"]
    return [
        Pair("export copy", seconds["export copy"], seconds["memcpy"], has_target=True),
        Pair("fetch copy", seconds["fetch copy"], seconds["fetch memcpy"], has_target=True),
        Pair("export call", seconds["export call"], seconds["memcpy"]),
        Pair("fetch call", seconds["fetch call"], seconds["fetch memcpy"]),
        Pair("end to end", both_s, seconds["memcpy"] + seconds["fetch memcpy"]),
    ]


def tcp_pairs(seconds: dict[str, float]) -> list[Pair]:
    return [Pair("fetch", seconds["fetch call"], seconds["plain"], has_target=True)]


PAIRS: dict[Kind, Callable[[dict[str, float]], list[Pair]]] = {
    "shm": shm_pairs,
    "tcp": tcp_pairs,
    "nixl": tcp_pairs,
}


def rows_of(kind: Kind, size: str, nbytes: int, pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{kind} {size} {pair.name}",
            "value": nbytes / pair.ours_s / 1e9,
            "unit": "GB/s",
            "reference": nbytes / pair.plain_s / 1e9,
            "ratio": pair.plain_s / pair.ours_s,
            "target": TARGET if pair.has_target and nbytes >= TARGET_FROM_BYTES[kind] else None,
        }
        for pair in pairs
    ]


def main() -> None:
    usable = [kind for kind in LARGEST if kind != "nixl" or importlib.util.find_spec("nixl")]
    kinds = [kind for kind in usable if kind in sys.argv[1:]] or usable
    print(f"{'':26}{'transfer':>9}{'plain copy':>12}{'ratio':>8}    load {os.getloadavg()[0]:.1f}")
    for row in run(kinds):
        met = (
            "" if row["target"] is None else "  ok" if row["ratio"] >= row["target"] else f"  below {row['target']:.2f}"
        )
        print(f"{row['name']:26}{row['value']:9.2f}{row['reference']:12.2f}{row['ratio']:8.2f}  {row['unit']}{met}")


if __name__ == "__main__":
    main()
