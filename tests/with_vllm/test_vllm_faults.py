"""What dies under vLLM costs no token: an engine, a worker, everything in turn."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pipeline.client import PoolClient
from pipeline.protocol import Request
from tests.chaos.test_chaos import run
from tests.contract.transfer_blocks import requires_nixl
from tests.e2e.processes import children
from tests.system import System, collect, request
from tests.with_vllm.settings import VLLM, requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.timeout(300)]

KINDS = [{"n": 1}, {"n": 3, "temperature": 1.0, "seed": 5}]


def asked() -> list[Request]:
    return [request(100, max_tokens=300, **kind) for kind in KINDS]  # type: ignore[arg-type]


async def read(client: PoolClient, item: Request) -> list[list[int]]:
    tokens, ended = await collect(await client.submit(item), item.input.sampling_options.n)
    assert ended.state == "done", ended
    return tokens


CONNECTORS = ["baton", pytest.param("nixl", marks=requires_nixl)]


@pytest.mark.parametrize("connector", ["baton", pytest.param("nixl", marks=[*requires_nixl, pytest.mark.slow])])
@pytest.mark.parametrize("victim", ["worker", "engine"])
async def test_a_decode_that_dies_goes_on_with_the_same_tokens(
    default_redis_url: str, tmp_path: Path, victim: str, connector: str
) -> None:
    settings = (*VLLM, "worker.lease_s=3", f"engine.vllm.connector={connector}")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system:
        _, decode = await asyncio.gather(system.worker("prefill"), system.worker("decode"))
        async with system.client() as client:
            expected = [await read(client, item) for item in asked()]
            items = asked()
            reading = [asyncio.create_task(read(client, item)) for item in items]
            for item in items:
                await system.until(lambda item=item: system.logged(item.id, 20), 30)
            [engine] = children(decode)
            os.kill(engine if victim == "engine" else decode.pid, signal.SIGKILL)
            if victim == "worker":
                await system.worker("decode")
            assert await asyncio.gather(*reading) == expected
            await system.until(system.rests, 20)
            with pytest.raises(ProcessLookupError):  # nothing of vLLM outlives its worker
                os.kill(engine, 0)


@pytest.mark.parametrize("connector", CONNECTORS)
async def test_blocks_whose_owner_died_are_computed_again(
    default_redis_url: str, tmp_path: Path, connector: str
) -> None:
    """Its handles wait for a decode worker when the prefill worker is killed, and shared memory is not where decode looks."""
    settings = (*VLLM, "worker.lease_s=3", "transfer.kind=tcp", f"engine.vllm.connector={connector}")
    async with System(default_redis_url, *settings, log_dir=tmp_path) as system:
        alone = await system.worker("decode")
        async with system.client() as client:
            expected = [await read(client, item) for item in asked()]
            alone.terminate()
            await asyncio.to_thread(alone.wait, 20)
            prefill = await system.worker("prefill")
            items = asked()
            reading = [asyncio.create_task(read(client, item)) for item in items]
            for item in items:
                await system.until(lambda item=item: system.logged(item.id, 1), 30)
            prefill.kill()
            await system.worker("decode")
            assert await asyncio.gather(*reading) == expected
            counters = (await client.snapshot()).counters
            recomputed = {name: n for name, n in counters.items() if name.startswith("kv_recomputed:")}
            assert recomputed.get("kv_recomputed:gone"), counters
            assert sum(recomputed.values()) >= len(items), counters
            await system.until(system.rests, 20)


@pytest.mark.timeout(600)
def test_nothing_is_lost_while_every_window_is_hit_once() -> None:
    run("--seconds", "150", "--seed", "1", "--engine", "vllm", "--clients", "8")
