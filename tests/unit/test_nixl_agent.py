"""The thread that calls NIXL: it outlives what NIXL raises, and nobody waits for it once it has ended."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest

from workers.transfers.way import Unusable
from workers.transfers.ways.nixl import agent as agents
from workers.transfers.ways.nixl.agent import Agent


class Nixl:
    """Shaped as NIXL's agent. Asked for news of others it fails."""

    def __init__(self, name: str, config: object) -> None:
        self.backends = {"UCX": 1}
        self.asked = 0

    def register_memory(self, *args: Any) -> None: ...

    def deregister_memory(self, *args: Any) -> None: ...

    def remove_remote_agent(self, name: str) -> None: ...

    def get_agent_metadata(self) -> bytes:
        return b"metadata"

    def get_new_notifs(self) -> None:
        self.asked += 1
        raise RuntimeError("NIXL_ERR_BACKEND")


@pytest.fixture
async def agent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    module = types.SimpleNamespace(nixl_agent_config=lambda **options: options, nixl_agent=Nixl)
    monkeypatch.setattr(agents, "load_nixl", lambda: module)
    made = Agent("baton-test", "UCX", has_readers=lambda: True)
    await made.start(0, 1)
    yield made
    await made.close()


async def test_it_outlives_what_nixl_raises_and_says_so_once(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(5):
        while agent._nixl.asked < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await agent.part("another")
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]  # its thread begins with the fixture
    assert [record.levelname for record in records if "NIXL_ERR_BACKEND" in record.getMessage()] == ["WARNING"]


async def test_nobody_waits_for_one_that_has_ended(agent: Agent) -> None:
    await agent.close()
    async with asyncio.timeout(5):
        with pytest.raises(Unusable, match="closed"):
            await agent.part("another")
        reading = agent.read("another", "DRAM", [])
        await asyncio.wait([reading])
    assert isinstance(reading.exception(), Unusable)
