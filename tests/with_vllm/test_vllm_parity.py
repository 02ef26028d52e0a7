"""Prompts through a prefill and a decode worker of vLLM give the tokens that vLLM alone gives, and decode computes no prompt."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.builtin import builtin_model_path
from tests.contract.transfer_blocks import requires_nixl
from tests.e2e.test_parity import decode_stats
from tests.e2e.test_transfer_ways import transfer_told
from tests.reference import Answer
from tests.system import System, collect, request
from tests.with_vllm.settings import VLLM, edge_prompts, requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.timeout(600)]

COUNT = 100
MAX_TOKENS = 36
WAY_SETTINGS = {
    "tcp": ("transfer.kind=tcp",),
    "nixl": ("transfer.kind=nixl",),
    "vLLM's own": ("engine.vllm.connector=nixl",),
}
WAYS = [pytest.param(way, marks=() if way == "tcp" else requires_nixl) for way in WAY_SETTINGS]
SMALL = ("engine.vllm.kv_cache_bytes=12582912",)  # 76 blocks: a long prompt and a few short ones


class Alone:
    """What vLLM alone answers, with an empty prefix cache and with a full one."""

    def __init__(self, cold: list[Answer], warm: list[Answer]) -> None:
        self.cold, self.warm = cold, warm

    def compare(self, number: int, tokens: list[int]) -> str:
        """Equal to either run, a near tie of either, or what differs."""
        verdicts = [answers[number].compare(tokens) for answers in (self.cold, self.warm)]
        return next((v for v in ("equal", "near tie") if v in verdicts), f"prompt {number}: {verdicts[0]}")


@pytest.fixture(scope="module")
def alone() -> Alone:
    told = json.dumps({"prompts": edge_prompts(COUNT), "max_tokens": MAX_TOKENS})
    command = [sys.executable, "-m", "tests.with_vllm.alone", str(builtin_model_path())]
    done = subprocess.run(
        command, input=told, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(done.stdout)
    return Alone(*([Answer(a["tokens"], a["margins"]) for a in runs[run]] for run in ("cold", "warm")))


@pytest.mark.parametrize(
    ("at_once", "overrides"),
    [
        pytest.param(1, (), id="one at a time"),
        pytest.param(28, (), id="28 at once"),
        pytest.param(28, SMALL, id="preemption forced"),
    ],
)
async def test_tokens_are_those_of_vllm_alone(
    alone: Alone, default_redis_url: str, tmp_path: Path, at_once: int, overrides: tuple[str, ...]
) -> None:
    await compare(alone, default_redis_url, tmp_path, range(COUNT), at_once, overrides)


@pytest.mark.parametrize("count", [30, pytest.param(COUNT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
async def test_by_each_way(alone: Alone, default_redis_url: str, tmp_path: Path, way: str, count: int) -> None:
    numbers = sorted(random.Random(6).sample(range(COUNT), count))
    await compare(
        alone,
        default_redis_url,
        tmp_path,
        numbers,
        28,
        WAY_SETTINGS[way],
        way="vllm-nixl" if way == "vLLM's own" else way,
    )


async def compare(
    alone: Alone,
    redis_url: str,
    folder: Path,
    numbers: Sequence[int],
    at_once: int,
    overrides: tuple[str, ...],
    *,
    way: str = "shm",
    gpus: tuple[str | None, str | None] = (None, None),
) -> None:
    """All of these prompts through a prefill and a decode worker, each on a GPU of its own where they are named."""
    prompts = edge_prompts(COUNT)
    async with System(redis_url, *VLLM, *overrides, log_dir=folder) as system:
        stages = zip(("prefill", "decode"), gpus, strict=True)
        await asyncio.gather(*(system.worker(stage, gpu=gpu) for stage, gpu in stages))
        async with system.client() as client:
            slots = asyncio.Semaphore(at_once)

            async def ask(number: int) -> str:
                async with slots:
                    tokens, ended = await collect(await client.submit(request(prompts[number], max_tokens=MAX_TOKENS)))
                assert ended.state == "done", ended
                return alone.compare(number, tokens[0])

            verdicts = collections.Counter(await asyncio.gather(*map(ask, numbers)))
            stats = await decode_stats(system, len(numbers) * (MAX_TOKENS - 1))
            recomputed = (await client.snapshot()).total("kv_recomputed:")
            await system.until(system.rests, 30)
            fetched = (await transfer_told(system, "decode"))["fetched"]
    print(f"\n{dict(verdicts)}, prompt tokens computed by decode {stats['prompt_tokens_computed']}, "
          f"preemptions {stats['preemptions']}, kv_recomputed {recomputed}, by {dict(fetched)}")  # fmt: skip
    assert list(fetched) == [way]
    assert fetched[way]["handles"] == len(numbers)
    assert set(verdicts) <= {"equal", "near tie"}, verdicts
    assert verdicts["near tie"] <= 2
    assert recomputed == 0
    assert stats["prompt_tokens_computed"] <= len(numbers)
    assert (stats["preemptions"] > 0) == (overrides == SMALL)
