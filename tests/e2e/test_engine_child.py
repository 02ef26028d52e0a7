"""The engine's process as its parent sees it: nothing goes on, and no block stays, for a call that the parent gave up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pipeline.config import EngineSettings, MockSettings, PoolSettings, TransferSettings
from pipeline.errors import EngineDied
from pipeline.protocol import BackendInput, Log, SamplingOptions, StopConditions
from workers import messages as m
from workers.child import ChildEngine

pytestmark = pytest.mark.faults


@asynccontextmanager
async def child(place: Path) -> AsyncIterator[ChildEngine]:
    settings = EngineSettings(mock=MockSettings(prefill_base_ms=0, prefill_token_ms=0))
    transfer = TransferSettings(dir=str(place), arena_bytes=16 * 1024 * 1024)
    engine = ChildEngine("w", PoolSettings(engine="mock"), settings, transfer, exports=True)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def test_a_start_that_is_given_up_leaves_no_shared_memory(tmp_path: Path) -> None:
    transfer = TransferSettings(dir=str(tmp_path), arena_bytes=16 * 1024 * 1024)
    engine = ChildEngine("w", PoolSettings(engine="mock"), EngineSettings(), transfer, exports=True)
    starting = asyncio.create_task(engine.start())
    async with asyncio.timeout(30):
        while not list(tmp_path.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    starting.cancel()
    await asyncio.wait([starting])
    await engine.close()
    assert list(tmp_path.iterdir()) == []


def request(name: str, max_tokens: int = 20_000) -> BackendInput:
    return BackendInput(
        request_id=name, model="mock", token_ids=list(range(3, 40)), stop_conditions=StopConditions(max_tokens=max_tokens),
        sampling_options=SamplingOptions(temperature=0),
    )  # fmt: skip


async def settled(engine: ChildEngine) -> None:
    """Wait until the child has said its figures anew: all that was sent before is in them."""
    for _ in range(3):
        before = engine.stats()
        async with asyncio.timeout(10):
            while engine.stats() is before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_decode_that_is_given_up_at_once_never_joins(tmp_path: Path) -> None:
    async with child(tmp_path) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        call = asyncio.create_task(engine.decode(request("r"), None, Log.empty(1)))
        await asyncio.sleep(0)  # it is sent
        call.cancel()  # and its cancellation lies behind it, so that the child reads both at once
        await asyncio.wait([call])
        os.kill(engine.pid, signal.SIGCONT)
        await settled(engine)
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)


async def test_blocks_of_a_prefill_that_was_given_up_are_freed(tmp_path: Path) -> None:
    async with child(tmp_path) as engine:
        for number in range(40):
            call = asyncio.create_task(engine.prefill(request(f"r{number}"), Log.empty(1)))
            await asyncio.sleep(0.0005 * (number % 10))
            call.cancel()
            await asyncio.wait([call])
            if not call.cancelled():
                kv = call.result().kv
                assert kv is not None
                await engine.release(kv.id)
        await settled(engine)
        assert engine.stats().handles_exported == 0


@pytest.mark.parametrize("order", ["cancelled, answered", "answered, cancelled"])
async def test_an_answer_that_crosses_its_cancellation_is_released(tmp_path: Path, order: str) -> None:
    """The answer and the cancellation meet before the caller goes on."""
    async with child(tmp_path) as engine:
        take, answered = engine._take, asyncio.Event()

        def cross(message: m.FromChild) -> None:
            if not isinstance(message, m.PrefillAnswer):
                take(message)
                return
            actions: list[Callable[[], object]] = [call.cancel, lambda: take(message)]
            for action in actions if order == "cancelled, answered" else reversed(actions):
                action()
            answered.set()

        engine._take = cross  # type: ignore[method-assign]
        await settled(engine)
        call = asyncio.create_task(engine.prefill(request("r"), Log.empty(1)))
        async with asyncio.timeout(10):
            await answered.wait()
        await asyncio.wait([call])
        assert call.cancelled()
        await settled(engine)
        assert engine.stats().handles_exported == 0


async def test_a_call_that_a_dead_engine_did_not_get_is_not_work_of_the_next_one(tmp_path: Path) -> None:
    async with child(tmp_path) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="the engine's process was ended by SIGKILL; its tasks are handed back"):
            async with asyncio.timeout(10):
                await anext(engine.steps())
        with pytest.raises(EngineDied):
            await engine.prefill(request("r"), Log.empty(1))
        await engine.close()
        await engine.start()
        await settled(engine)
        assert not engine.is_busy()  # else it is stopped as stalled while it only waits for Redis


async def test_bytes_that_are_no_message_end_the_engine_instead_of_deafening_it(tmp_path: Path) -> None:
    async with child(tmp_path) as engine:
        take = engine._take

        def stumble(message: m.FromChild) -> None:
            engine._take = take  # type: ignore[method-assign]
            raise ValueError("not a message")

        engine._take = stumble  # type: ignore[method-assign]
        with pytest.raises(EngineDied, match="not a message"):
            async with asyncio.timeout(10):
                await anext(engine.steps())
