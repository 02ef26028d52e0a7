"""The torch engine beside vLLM on the same CPU, model and contract: each in a child process of its own, one thread, float32, in turn.

Rates are medians of the rounds, measured as in `bench_engine.py`; both engines have as much memory for blocks and no prefix cache. vLLM
is measured as it starts by itself, and once more with `enforce_eager`, which starts sooner. Memory is that of the engine's process after
the rounds: RSS, and USS, which leaves out what is shared with others.

    .venv-vllm/bin/python -m benchmarks vllm
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from benchmarks.bench_engine import BATCHES, PREFILL_TOKENS, Ours, built_in_or_random
from benchmarks.table import Row, print_rows
from pipeline.config import EngineSettings, PoolSettings, TorchSettings, TransferSettings, VllmSettings
from workers.child import ChildEngine

ROUNDS = 7
KV_BYTES = 64 << 20  # what 1,024 blocks of the built-in model take
VOCABULARY = 2048
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Measured:
    """One engine: how long it took to start, what it can do, what memory it takes."""

    def __init__(self, engine: str, model: str, folder: Path, *, is_eager: bool = True) -> None:
        settings = EngineSettings(
            torch=TorchSettings(device="cpu", dtype="float32", prefix_cache=False),
            vllm=VllmSettings(
                dtype="float32", block_size=32, kv_cache_bytes=KV_BYTES, max_num_seqs=64, max_num_batched_tokens=512,
                prefix_cache=False, enforce_eager=is_eager,
            ),
        )  # fmt: skip
        transfer = TransferSettings(kind="shm", dir=str(folder))
        self._engine = ChildEngine("bench", PoolSettings(model=model, engine=engine), settings, transfer, exports=False)
        self._ours = Ours(self._engine, VOCABULARY)
        self.start_s = 0.0

    async def __aenter__(self) -> Measured:
        began_s = perf_counter()
        await self._engine.start()
        self.start_s = perf_counter() - began_s
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.close()

    async def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return await self._ours.prefill_rate()

    async def decode_rate(self, batch: int) -> float:
        """Tokens a second."""
        return await self._ours.decode_rate(batch)

    def memory_mib(self) -> dict[str, float]:
        """Of the engine's process."""
        memory = psutil.Process(self._engine.pid).memory_full_info()
        return {"RSS": memory.rss / 2**20, "USS": memory.uss / 2**20}


async def measure(model: str, folder: Path) -> list[Row]:
    """Rows of torch beside vLLM as it is, then beside an eager one."""
    rows: list[Row] = []
    for is_eager in (False, True):
        label = "eager vLLM" if is_eager else "vLLM"
        async with contextlib.AsyncExitStack() as stack:
            ours = await stack.enter_async_context(Measured("torch", model, folder))
            theirs = await stack.enter_async_context(Measured("vllm", model, folder, is_eager=is_eager))
            rows += await beside(label, ours, theirs)
    return rows


async def beside(label: str, ours: Measured, theirs: Measured) -> list[Row]:
    """Both take turns, so that they see the same machine."""
    kinds: dict[str, Callable[[Measured], Awaitable[float]]] = {
        f"prefill, {PREFILL_TOKENS}-token prompt": lambda engine: engine.prefill_rate(),
        **{f"decode, batch {batch}": lambda engine, batch=batch: engine.decode_rate(batch) for batch in BATCHES},
    }
    rows = []
    for name, rate in kinds.items():
        values = [(await rate(ours), await rate(theirs)) for _ in range(ROUNDS + 1)][1:]  # the first one warms up
        own, reference = (statistics.median(side) for side in zip(*values, strict=True))
        rows.append(Row(f"torch beside {label}: {name}", own, "tokens/s", reference))
    rows.append(Row(f"torch beside {label}: start", ours.start_s, "s", theirs.start_s))
    memory = theirs.memory_mib()
    rows += [Row(f"torch beside {label}: {kind}", mib, "MiB", memory[kind]) for kind, mib in ours.memory_mib().items()]
    return rows


def run() -> list[dict[str, Any]]:
    """All rows; for rates a ratio above 1 means that torch is ahead, for start and memory one below 1. Raises RuntimeError without vLLM."""
    if find_spec("vllm") is None:
        raise RuntimeError("vLLM is not installed here: `make test-vllm` makes .venv-vllm, run it there")
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        return [row.as_dict() for row in asyncio.run(measure(built_in_or_random(Path(folder)), Path(folder)))]


if __name__ == "__main__":
    print_rows(run())
