"""Prompts through the whole pipeline give the greedy tokens of Hugging Face `generate` on the same weights.

All are sent to a prefill worker. The decode process computes at most one prompt token a request and recomputes nothing; with one byte of
every published block flipped each request is recomputed, and the tokens are still right.
"""

from __future__ import annotations

import asyncio
import collections
import json
from pathlib import Path

import msgspec
import pytest

from pipeline.builtin import builtin_model_path
from pipeline.client import PoolClient
from pipeline.protocol import KVHandle
from tests.reference import Answer, Reference
from tests.system import POOL, System, collect, request
from workers.transfers.arena import PeerArena

MODEL = builtin_model_path()
MAX_TOKENS = 12
TORCH = (f"pools.{POOL}.engine=torch", "engine.torch.num_blocks=3072", "engine.torch.max_num_seqs=32")
SMALL_POOL = ("engine.torch.num_blocks=110",)  # one long prompt, or short ones that outgrow it together


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


SHORT = pytest.param(12, id="12 prompts")
FULL = pytest.param(200, id="200 prompts", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [SHORT, FULL])
@pytest.mark.parametrize(
    ("at_once", "max_tokens", "overrides"),
    [
        pytest.param(1, 12, (), id="one at a time"),
        pytest.param(32, 12, (), id="32 at once"),
        pytest.param(32, 12, ("engine.torch.prefix_cache=false",), id="no prefix cache"),
        pytest.param(32, 128, SMALL_POOL, id="preemption forced"),
    ],
)
async def test_greedy_tokens_are_those_of_generate(
    reference: Reference,
    default_redis_url: str,
    tmp_path: Path,
    count: int,
    at_once: int,
    max_tokens: int,
    overrides: tuple[str, ...],
) -> None:
    prompts = reference.prompts(count, seed=7)
    answers = [reference.greedy(prompt, max_tokens) for prompt in prompts]
    async with System(default_redis_url, *TORCH, *overrides, log_dir=tmp_path) as system:
        await system.worker("prefill")
        async with system.client() as client:
            asking = asyncio.create_task(ask_all(client, prompts, answers, at_once))
            await system.until(lambda: handed_over(system, min(count, at_once)), 120)
            await system.worker("decode")  # only now, so that as many as it takes begin together
            verdicts = await asking
            stats = await decode_stats(system, count * (max_tokens - 1))
            recomputed = (await client.snapshot()).total("kv_recomputed:")
    print(f"\n{dict(verdicts)}, prompt tokens computed by decode {stats['prompt_tokens_computed']}, "
          f"preemptions {stats['preemptions']}, kv_recomputed {recomputed}")  # fmt: skip
    assert set(verdicts) <= {"equal", "near tie"}, verdicts
    assert verdicts["near tie"] <= max(1, count // 100)
    assert recomputed == 0
    if overrides == SMALL_POOL:
        assert stats["preemptions"] > 0
    else:
        assert stats["prompt_tokens_computed"] <= count


async def ask_all(
    client: PoolClient, prompts: list[list[int]], answers: list[Answer], at_once: int
) -> collections.Counter[str]:
    slots = asyncio.Semaphore(at_once)

    async def ask(prompt: list[int], answer: Answer) -> str:
        async with slots:
            tokens, ended = await collect(await client.submit(request(prompt, max_tokens=len(answer.tokens))))
        assert ended.state == "done", ended
        return answer.compare(tokens[0])

    return collections.Counter(await asyncio.gather(*map(ask, prompts, answers)))


async def decode_stats(system: System, tokens: int) -> dict[str, int]:
    """The decode engine's own figures, once they cover all requests."""
    [name] = await system.alive("decode")
    found: dict[str, int] = {}

    async def settled() -> bool:
        info = json.loads(await system.connection.command("HGET", system.keys.worker(name), "info"))
        found.update(info["stats"])
        return found["output_tokens"] >= tokens and found["running"] == 0

    await system.until(settled, 30)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [SHORT, FULL])
async def test_a_flipped_byte_in_every_block_is_found_and_recomputed(
    reference: Reference, default_redis_url: str, tmp_path: Path, count: int
) -> None:
    prompts = reference.prompts(count, seed=11, longest=600)
    answers = [reference.greedy(prompt, MAX_TOKENS) for prompt in prompts]
    async with System(default_redis_url, *TORCH, "transfer.arena_bytes=1073741824", log_dir=tmp_path) as system:
        await system.worker("prefill")
        async with system.client() as client:
            asking = asyncio.create_task(ask_all(client, prompts, answers, count))
            await system.until(lambda: handed_over(system, count), 120)
            flipped = sum([await flip_every_block(system, key) for key in await requests_of(system)])
            await system.worker("decode")
            verdicts = await asking
            await asyncio.sleep(0.6)
            counters = (await client.snapshot()).counters
    print(f"\n{flipped} blocks flipped, {dict(verdicts)}, kv_recomputed:digest {counters['kv_recomputed:digest']}")
    assert flipped >= count
    assert set(verdicts) <= {"equal", "near tie"}, verdicts
    assert counters["kv_recomputed:digest"] == count


async def handed_over(system: System, count: int) -> bool:
    return await system.counter("handovers") >= count


async def requests_of(system: System) -> list[bytes]:
    keys: list[bytes] = await system.connection.command("KEYS", system.keys.root + "req:*")
    return keys


async def flip_every_block(system: System, key: bytes) -> int:
    """Change one byte of each block behind the request's handle, in the arena itself."""
    handle = msgspec.msgpack.decode(await system.connection.command("HGET", key, "handle"), type=KVHandle)
    directory = Path(system.settings.transfer.dir)
    offer = handle.params["offers"][0]["params"]
    peer = PeerArena.open(directory, offer["arena"])
    start = peer._header.data_offset + offer["first"] * peer._header.slab_bytes
    block_nbytes = handle.nbytes // handle.num_blocks
    with (directory / offer["arena"]).open("r+b") as arena:
        for offset in range(start + 1, start + handle.nbytes, block_nbytes):
            arena.seek(offset)
            byte = arena.read(1)[0]
            arena.seek(offset)
            arena.write(bytes([byte ^ 0xFF]))
    return handle.num_blocks
