"""What vLLM's prefix cache holds is told as it changes, by who computed a prompt and by who was handed its blocks alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pipeline.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from pipeline.protocol import BackendInput, RoutingHints, unpack_tokens
from tests.contract.engines import Running, request_of
from tests.with_vllm.pairs import BLOCK, Pair, child, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


class View:
    """A prefix cache as a router would know it: the tokens before and in each block, by its hash."""

    def __init__(self, running: Running) -> None:
        self.blocks: dict[int, tuple[str, list[int]]] = {}
        self.removed = 0
        self.first: KVEvent | None = None
        self.task = asyncio.create_task(self._read(running))

    async def _read(self, running: Running) -> None:
        async for events in running.engine.kv_events():
            for event in events:
                self.first = self.first or event
                self._take(event)

    def _take(self, event: KVEvent) -> None:
        match event:
            case BlocksCleared():
                self.blocks.clear()
            case BlocksRemoved():
                self.removed += len(event.hashes)
                for one in event.hashes:
                    del self.blocks[one]
            case BlocksStored():
                salt, before = (event.salt, []) if event.parent is None else self.blocks[event.parent]
                tokens = unpack_tokens(event.tokens)
                assert len(tokens) == event.block_size * len(event.hashes) == BLOCK * len(event.hashes)
                for at, one in enumerate(event.hashes, start=1):
                    self.blocks[one] = salt, before + tokens[: at * BLOCK]

    def prompts(self) -> list[tuple[str, list[int]]]:
        return sorted(self.blocks.values())

    async def until(self, blocks: int) -> None:
        async with asyncio.timeout(20):
            while len(self.blocks) < blocks:
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_at(tmp_path_factory.mktemp("blocks"), kv_events=True) as both:
        yield both


def salted(request: BackendInput) -> BackendInput:
    return msgspec.structs.replace(request, routing=RoutingHints(cache_salt="pepper"))


async def test_both_sides_of_a_hand_over_tell_the_same_blocks(pair: Pair) -> None:
    views = [View(pair.prefill), View(pair.decode)]
    plain = request_of("plain", prompt(100), 2 * BLOCK)
    [tokens] = await pair.decode.take_over(pair.prefill, plain)
    await pair.decode.take_over(pair.prefill, salted(msgspec.structs.replace(plain, request_id="salted")))
    for view in views:
        await view.until(6)
        assert view.first == BlocksCleared()
    whole = [*plain.token_ids, *tokens]
    known = [(salt, plain.token_ids[: BLOCK * full]) for salt in ("", "pepper") for full in (1, 2, 3)]
    assert views[0].prompts() == known
    assert views[0].blocks.items() <= views[1].blocks.items()
    answered = [(salt, tokens) for salt, tokens in views[1].prompts() if len(tokens) > 3 * BLOCK]
    assert all(tokens == whole[: len(tokens)] for _, tokens in answered)
    for view in views:
        view.task.cancel()


async def test_what_is_evicted_is_told(tmp_path: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("small")
    async with child("small", place, kv_events=True, kv_cache_bytes=12 * 2**20) as running:
        view = View(running)
        for number in range(8):
            await running.generate(request_of(f"r{number}", prompt(600, 100 + number), 2))
        await view.until(1)
        assert view.removed > 0
        assert len(view.blocks) <= running.engine.info.num_blocks
        view.task.cancel()
