"""Prompts through a prefill and a decode worker of vLLM give the tokens that vLLM alone gives, and decode computes no prompt."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.builtin import builtin_model_path
from tests.e2e.test_parity import decode_stats
from tests.reference import Answer
from tests.system import System, collect, request
from tests.with_vllm.settings import VLLM, edge_prompts, requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.timeout(600)]

COUNT = 100
MAX_TOKENS = 36
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
    prompts = edge_prompts(COUNT)
    async with System(default_redis_url, *VLLM, *overrides, log_dir=tmp_path) as system:
        await asyncio.gather(system.worker("prefill"), system.worker("decode"))
        async with system.client() as client:
            slots = asyncio.Semaphore(at_once)

            async def ask(number: int) -> str:
                async with slots:
                    tokens, ended = await collect(await client.submit(request(prompts[number], max_tokens=MAX_TOKENS)))
                assert ended.state == "done", ended
                return alone.compare(number, tokens[0])

            verdicts = collections.Counter(await asyncio.gather(*map(ask, range(COUNT))))
            stats = await decode_stats(system, COUNT * (MAX_TOKENS - 1))
            recomputed = (await client.snapshot()).total("kv_recomputed:")
    print(f"\n{dict(verdicts)}, prompt tokens computed by decode {stats['prompt_tokens_computed']}, "
          f"preemptions {stats['preemptions']}, kv_recomputed {recomputed}")  # fmt: skip
    assert set(verdicts) <= {"equal", "near tie"}, verdicts
    assert verdicts["near tie"] <= 2
    assert recomputed == 0
    assert stats["prompt_tokens_computed"] <= COUNT
    assert (stats["preemptions"] > 0) == (overrides == SMALL)
