"""Blocks from one GPU to another, by each way, beside plain copies: `python -m benchmarks.gpu_transfer [--out FILE]`.

The memory is that of an 8B-shaped Llama in bfloat16, 128 KiB a token, without the model. An owner exports the blocks of a prompt, which
lie scattered, from GPU 0; this process fetches them into scattered blocks of GPU 1 (or of the only one) and compares every byte.
`export` and `fetch` are whole calls; `both` is their sum, which is what a hand-over adds besides its messages.
The references: a copy of the same bytes in one piece, between the GPUs and through pinned host memory each way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Self

import msgspec
import torch

from pipeline.config import TransferSettings
from pipeline.protocol import KVHandle
from workers.engines.paged.exchange import ExportedBlocks
from workers.engines.vllm.memory import PagedMemory
from workers.transfer import Memory
from workers.transfers.block_transfer import BlockTransfer

BLOCK_TOKENS = 16
LAYERS, BLOCK_SHAPE = 32, (8, BLOCK_TOKENS, 256)  # 8 heads, keys and values of 128
BLOCKS = 1536  # on each side: 3 GiB
KINDS = ("cuda_ipc", "shm", "tcp")
ROUNDS, WARM_UP = 7, 2
LAYOUT = "gpu-transfer"


class Blocks:
    """The paged memory of one engine, and runs of random bytes to put there and to find there."""

    def __init__(self, device: int = 0) -> None:
        self.device = torch.device("cuda", device)
        shape = (BLOCKS, *BLOCK_SHAPE)
        self.layers = {
            f"layer.{n:02}": torch.zeros(shape, dtype=torch.bfloat16, device=self.device) for n in range(LAYERS)
        }
        self.memory = PagedMemory(self.layers)

    def choose(self, tokens: int, seed: int) -> list[int]:
        """Scattered blocks for so many tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(BLOCKS, generator=generator)[: -(-tokens // BLOCK_TOKENS)].tolist()

    def content(self, count: int, seed: int) -> torch.Tensor:
        """What a run of `count` blocks holds: [layers, blocks, bytes of a block in a layer]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        row = self.memory.block_nbytes // LAYERS
        shape = (LAYERS, count, row)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)

    def write(self, blocks: list[int], seed: int) -> None:
        """Fill blocks, by other means than the transfer's."""
        for layer, rows in zip(self.layers.values(), self.content(len(blocks), seed), strict=True):
            layer.view(BLOCKS, -1).view(torch.uint8)[blocks] = rows
        torch.cuda.synchronize(self.device)

    def holds(self, blocks: list[int], seed: int) -> bool:
        """Whether every byte is there."""
        runs = zip(self.layers.values(), self.content(len(blocks), seed), strict=True)
        return all(bool((layer.view(BLOCKS, -1).view(torch.uint8)[blocks] == rows).all()) for layer, rows in runs)

    def source(self, blocks: list[int]) -> ExportedBlocks:
        """To export."""
        return ExportedBlocks(
            self.memory, request_id="bench", layout=LAYOUT, blocks=blocks, block_nbytes=self.memory.block_nbytes,
            num_tokens=len(blocks) * BLOCK_TOKENS, cached_tokens=0,
        )  # fmt: skip


class Sink:
    """To fetch into."""

    layout = LAYOUT

    def __init__(self, memory: PagedMemory, blocks: list[int]) -> None:
        self._memory = memory
        self._blocks = blocks
        self.device = memory.device
        self.nbytes = len(blocks) * memory.block_nbytes

    def scatter(self, data: Memory) -> None:
        self._memory.scatter(data, self._blocks, 0, self._memory.now())


def settings_of(kind: str, place: str) -> TransferSettings:
    told = {"kind": kind, "dir": place, "arena_bytes": 3 << 30, "cuda_arena_bytes": 3 << 30}
    return msgspec.convert(told | {"tcp": {"staging_bytes": 2 << 30}}, TransferSettings)


class Owner:
    """A process of its own that exports from a GPU what it is told to."""

    def __init__(self, kind: str, place: str, gpu: str) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        command = [sys.executable, "-m", "benchmarks.gpu_transfer", "--owner", kind, place]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def export(self, tokens: int, seed: int) -> tuple[KVHandle, float]:
        """The handle, and how many seconds its export took."""
        told = self._ask({"export": tokens, "seed": seed})
        return msgspec.convert(told["handle"], KVHandle), told["seconds"]

    def release(self, handle: KVHandle) -> None:
        """Free it."""
        self._ask({"release": handle.id})

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the owner ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


async def own(kind: str, place: str) -> None:
    """What the owner's process does."""
    blocks = Blocks()
    transfer = BlockTransfer(settings_of(kind, place), "owner")
    await transfer.start(0)
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "export" in told:
            chosen = blocks.choose(told["export"], told["seed"])
            blocks.write(chosen, told["seed"])
            start_s = perf_counter()
            handle = await transfer.export(blocks.source(chosen))
            answer = {"seconds": perf_counter() - start_s, "handle": msgspec.to_builtins(handle)}
        else:
            await transfer.release(told["release"])
            answer = {}
        print(json.dumps(answer), flush=True)
    await transfer.close()


async def measure(kind: str, sizes: list[int], gpu: str) -> list[dict[str, Any]]:
    """Milliseconds and GB/s of each size, by this way."""
    rows = []
    blocks = Blocks()
    with TemporaryDirectory(dir="/dev/shm") as place, Owner(kind, place, gpu) as owner:
        reader = BlockTransfer(settings_of(kind, place), "reader", exports=False)
        await reader.start(0)
        for tokens in sizes:
            rounds = [await one_round(owner, reader, blocks, tokens, seed) for seed in range(ROUNDS + WARM_UP)]
            export_s, fetch_s = (median(times[part] for times in rounds[WARM_UP:]) for part in (0, 1))
            nbytes = -(-tokens // BLOCK_TOKENS) * blocks.memory.block_nbytes
            rows.append(
                {
                    "way": kind, "tokens": tokens, "MiB": nbytes / 2**20, "export_ms": export_s * 1e3,
                    "fetch_ms": fetch_s * 1e3, "both_ms": (export_s + fetch_s) * 1e3, "GB/s": nbytes / (export_s + fetch_s) / 1e9,
                    "first_ms": (rounds[0][0] * 1e3, rounds[0][1] * 1e3),
                }
            )  # fmt: skip
        await reader.close()
    return rows


async def one_round(owner: Owner, reader: BlockTransfer, blocks: Blocks, tokens: int, seed: int) -> tuple[float, float]:
    """Seconds of the export and of the fetch. Raises where a byte differs."""
    handle, export_s = await asyncio.to_thread(owner.export, tokens, seed)
    target = blocks.choose(tokens, seed + 1000)
    start_s = perf_counter()
    await reader.fetch(handle, Sink(blocks.memory, target))
    fetch_s = perf_counter() - start_s
    await asyncio.to_thread(owner.release, handle)
    if not blocks.holds(target, seed):
        raise RuntimeError(f"{handle.transfer}: {tokens} tokens: the blocks differ")
    return export_s, fetch_s


def plain_copies(sizes: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of copies in one piece: what the machine can do."""
    last = torch.cuda.device_count() - 1
    rows = []
    for tokens in sizes:
        nbytes = tokens * 2 * LAYERS * 8 * 128 * 2
        here, there = (torch.ones(nbytes, dtype=torch.uint8, device=f"cuda:{n}") for n in (0, last))
        pinned = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
        copies = {"gpu to gpu": (there, here), "to host": (pinned, here), "from host": (there, pinned)}
        for name, (to, source) in copies.items():
            rows.append({"copy": name, "tokens": tokens, "ms": milliseconds_of(to, source)})
    return rows


def milliseconds_of(to: torch.Tensor, source: torch.Tensor) -> float:
    """Median of a copy."""
    times = []
    for _ in range(ROUNDS + WARM_UP):
        torch.cuda.synchronize()
        start_s = perf_counter()
        to.copy_(source, non_blocking=True)
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        times.append((perf_counter() - start_s) * 1e3)
    return median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default="512,2048,8192", help="prompt lengths")
    parser.add_argument("--kinds", default=",".join(KINDS), help="ways")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--owner", nargs=2, metavar=("KIND", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(tokens) for tokens in arguments.tokens.split(",")]
    if arguments.owner:
        asyncio.run(own(*arguments.owner))
    elif arguments.plain:
        print(json.dumps(plain_copies(sizes)))
    else:
        compare(arguments, sizes)


def compare(arguments: argparse.Namespace, sizes: list[int]) -> None:
    """All ways after plain copies; prints a line a figure."""
    plain = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_transfer", "--plain", "--tokens", arguments.tokens],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(plain.stdout)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first, *others = gpus.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = others[0] if others else first  # before this process touches a GPU
    for kind in arguments.kinds.split(","):
        try:
            rows += asyncio.run(measure(kind, sizes, first))
        except Exception as error:  # noqa: BLE001  # one way fails, the others are measured
            rows.append({"way": kind, "error": f"{type(error).__name__}: {error}"})
    for row in rows:
        print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
