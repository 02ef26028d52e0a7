"""A lane is a priority inside vLLM, too: what is asked for on the high one does not wait behind what came before it on others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from pipeline.protocol import BackendInput, Log, RoutingHints
from pipeline.queue import LANES
from tests.contract.engines import request_of
from tests.with_vllm.pairs import child, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.timeout(300)]


def on(lane: str, name: str, max_tokens: int = 8) -> BackendInput:
    asked = request_of(name, prompt(40, sum(map(ord, name))), max_tokens)
    return msgspec.structs.replace(asked, routing=RoutingHints(priority=LANES.index(lane)))


async def test_what_waits_in_the_engine_begins_in_the_order_of_its_lanes(tmp_path: Path) -> None:
    asked = [
        on("low", "first", 200),
        on("low", "l1"),
        on("low", "l2"),
        on("default", "d1"),
        on("high", "h1"),
        on("high", "h2"),
    ]
    async with child("alone", tmp_path, max_num_seqs=1) as running:
        joining = [asyncio.create_task(running.engine.decode(asked[0], None, Log.empty(1)))]
        await joining[0]  # it runs before the others are there
        joining += [asyncio.create_task(running.engine.decode(item, None, Log.empty(1))) for item in asked[1:]]
        await running.until(lambda: len(running.ends) == len(asked))
        await asyncio.gather(*joining)
    assert [name for name, _ in running.ends] == ["first", "h1", "h2", "d1", "l1", "l2"]
