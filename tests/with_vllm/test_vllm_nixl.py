"""Hand-over by vLLM's own NixlConnector: what `AsyncEngine` promises holds for it, too, and blocks go when Baton says so."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pipeline.errors import KVLost, WireError
from pipeline.protocol import KVHandle, Log
from tests.contract.engines import Running, request_of
from tests.contract.transfer_blocks import requires_nixl
from tests.with_vllm.pairs import Pair, child, fresh, held, prompt
from tests.with_vllm.settings import requires_vllm
from tests.with_vllm.test_vllm_engine import KINDS, exported

pytestmark = [
    pytest.mark.vllm,
    requires_vllm,
    *requires_nixl,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    place = tmp_path_factory.mktemp("blocks")
    async with child("prefill", place, connector="nixl") as prefill, child("decode", place, connector="nixl") as decode:
        yield Pair(prefill, decode)
        assert not list(place.iterdir()), "Baton's shared memory was taken for nothing"


async def rests(running: Running, within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while held(await fresh(running)) != (0, 0, 0, 0):
            pass


def with_params(kv: KVHandle, **params: Any) -> KVHandle:
    return msgspec.structs.replace(kv, params=kv.params | params)


@pytest.mark.parametrize("kind", ["greedy", "seeded", "seeded, penalties"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 200, 600])
async def test_handed_over_the_tokens_are_the_same(pair: Pair, kind: str, length: int) -> None:
    asked = request_of(f"here {kind} {length}", prompt(length, length), 12, n=3, **KINDS[kind])
    [here] = await pair.prefill.generate(asked)
    before = (await fresh(pair.decode)).prompt_tokens_computed
    over = await pair.decode.take_over(pair.prefill, msgspec.structs.replace(asked, request_id=f"over {kind} {length}"))
    assert over == here
    await pair.rests()
    assert pair.decode.engine.stats().prompt_tokens_computed == before


async def test_a_reader_does_not_free_what_the_next_one_may_need(pair: Pair) -> None:
    """The first one lost the request after it had read the blocks; by itself vLLM frees them then."""
    asked, kv, log = await exported(pair, "twice", 333)
    for name in ("first", "second"):
        again = msgspec.structs.replace(asked, request_id=name)
        assert await pair.decode.engine.decode(again, kv, log) == 333
        if name == "first":
            await pair.decode.engine.cancel(name)
    [tokens] = await pair.decode.finished(msgspec.structs.replace(asked, request_id="second"))
    stats = await fresh(pair.prefill)
    assert (stats.handles_exported, stats.blocks_used) == (1, 11)
    await pair.prefill.engine.release(kv.id)
    [[whole]] = await pair.prefill.generate(msgspec.structs.replace(asked, request_id="alone"))
    assert log.tokens[0] + tokens == whole
    await pair.rests()


@pytest.mark.slow
async def test_what_nobody_has_read_goes_a_while_after_it_was_released(pair: Pair) -> None:
    """A reader that has just lost it may still be reading: what it reads must not be another prompt's."""
    _, kv, _ = await exported(pair, "unread", 100)
    await pair.prefill.engine.release(kv.id)
    stats = await fresh(pair.prefill)
    assert (stats.handles_exported, stats.blocks_used) == (0, 4)
    await rests(pair.prefill, 40)


@pytest.mark.slow
async def test_a_prefill_that_is_given_up_at_any_moment_leaves_no_handle(pair: Pair) -> None:
    for number in range(40):
        asked = request_of(f"any moment {number}", prompt(40, 500 + number), 10, n=4, temperature=1.0, seed=number)
        prefilling = asyncio.create_task(pair.prefill.engine.prefill(asked, Log.empty(4)))
        await asyncio.wait([prefilling], timeout=0.001 * (number % 30))
        prefilling.cancel()
        await asyncio.wait([prefilling])
        if not prefilling.cancelled():
            kv = prefilling.result().kv
            assert kv is not None
            await pair.prefill.engine.release(kv.id)
    await rests(pair.prefill, 60)


async def test_handles_that_are_none_of_its_own(pair: Pair) -> None:
    asked, kv, log = await exported(pair, "lies", 70)
    for changed in (
        msgspec.structs.replace(kv, transfer="shm"),
        msgspec.structs.replace(kv, params={}),
        with_params(kv, remote_block_ids=[[1]]),
        with_params(kv, remote_block_ids=[[1, 2, -3]]),
        with_params(kv, remote_block_ids=[[1, 2, 3], [1, 2, 3]]),
        with_params(kv, remote_port=0),
        with_params(kv, remote_host=1),
        with_params(kv, tp_size=0),
    ):
        with pytest.raises(WireError):
            await pair.decode.engine.decode(asked, changed, log)
    with pytest.raises(KVLost) as error:
        await pair.decode.engine.decode(asked, msgspec.structs.replace(kv, layout="other"), log)
    assert error.value.reason == "layout"
    for changed in (
        with_params(kv, remote_block_ids=[[1, 2, 2**24 - 1]]),
        with_params(kv, remote_engine_id="other", remote_port=1),
    ):
        with pytest.raises(KVLost) as error:
            await pair.decode.engine.decode(asked, changed, log)
        assert error.value.reason == "gone"
    assert await pair.decode.engine.decode(asked, None, log) == 0  # nothing of it is in the prefix cache
    [tokens] = await pair.decode.finished(asked)
    await pair.prefill.engine.release(kv.id)
    [[whole]] = await pair.prefill.generate(msgspec.structs.replace(asked, request_id="true"))
    assert log.tokens[0] + tokens == whole


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_owner_that_was_killed(pair: Pair, tmp_path: Path, is_known: bool) -> None:
    async with child("prefill", tmp_path, connector="nixl") as other:
        doomed = Pair(other, pair.decode)
        asked, kv, log = await exported(doomed, f"doomed {is_known}", 70 + is_known)
        if is_known:
            await pair.decode.take_over(other, request_of("known", prompt(50, 9)))
        os.kill(other.engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(30):
            with pytest.raises(KVLost) as error:
                await pair.decode.engine.decode(asked, kv, log)
        assert error.value.reason == "gone"
        assert await pair.decode.engine.decode(asked, None, log) == 0
        [tokens] = await pair.decode.finished(asked)
        [[whole]] = await pair.prefill.generate(msgspec.structs.replace(asked, request_id=f"right {is_known}"))
        assert log.tokens[0] + tokens == whole
    await rests(pair.decode)
