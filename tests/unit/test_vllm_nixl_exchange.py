"""What Baton knows of vLLM's NixlConnector without vLLM: its handles, and who keeps which blocks until when."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pipeline.config import TransferSettings
from pipeline.errors import Unservable, WireError
from pipeline.protocol import KVHandle
from workers.engines.vllm.exchange import Export, Fetch
from workers.engines.vllm.memory import PagedMemory
from workers.engines.vllm.nixl_exchange import LINGER_S, TRANSFER, NixlExchange
from workers.transfers.block_transfer import BlockTransfer

PARAMS: dict[str, Any] = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": ([4, 5, 6],), "remote_engine_id": "e",
    "remote_request_id": "r#0.1", "remote_host": "localhost", "remote_port": 5600, "tp_size": 1, "of a later version": [1],
}  # fmt: skip


class Thread:
    """vLLM's thread: orders are run when a test says so; `freed` are the requests whose blocks may go, and after how long."""

    def __init__(self, place: Path) -> None:
        transfer = BlockTransfer(TransferSettings(dir=str(place)), "prefill@host.1")
        self.orders: list[Callable[[], None]] = []
        self.freed: list[tuple[str, float]] = []
        self.exchange = NixlExchange(transfer, lambda: "layout", lambda moved: None, self.orders.append)
        self.exchange.register(PagedMemory({"layer": torch.zeros(8, 2, 16, dtype=torch.uint8)}))
        self.exchange.free = lambda key, linger_s: self.freed.append((key, linger_s))

    def run(self) -> None:
        while self.orders:
            self.orders.pop(0)()

    async def published(self, layout: str = "") -> KVHandle:
        export = Export("r", 70, asyncio.get_running_loop().create_future(), cached_tokens=3, layout=layout)
        self.exchange.expect_export("r#0.1", export)
        assert self.exchange.params("r#0.1") == {"do_remote_decode": True, "do_remote_prefill": False}
        self.exchange.publish("r#0.1", PARAMS)
        self.exchange.forget("r#0.1")
        return await export.handle


@pytest.fixture
async def thread(tmp_path: Path) -> Thread:
    return Thread(tmp_path)


def fetch_of(handle: KVHandle) -> Fetch:
    return Fetch(handle, asyncio.get_running_loop().create_future())


async def test_what_vllm_says_travels_unread_and_comes_back(thread: Thread) -> None:
    handle = await thread.published()
    assert (handle.owner, handle.transfer, handle.num_tokens, handle.num_blocks) == ("prefill@host.1", TRANSFER, 70, 3)
    assert (handle.nbytes, handle.cached_tokens, handle.layout) == (96, 3, "layout")
    assert (await thread.published("layout+lora-x")).layout == "layout+lora-x"
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(handle), type=KVHandle)
    thread.exchange.expect_fetch("r#0.2", fetch_of(arrived))
    told = thread.exchange.params("r#0.2")
    assert told == PARAMS | {"remote_block_ids": [[4, 5, 6]]}
    assert thread.exchange.params("another") is None


async def test_blocks_are_held_until_the_handle_is_released(thread: Thread) -> None:
    handle = await thread.published()
    stats = thread.exchange.stats()
    assert (stats.handles, stats.bytes_used, stats.bytes_free) == (1, 96, 7 * 32 - 96)
    for handle_id in ("unknown", handle.id, handle.id):
        await thread.exchange.release(handle_id)
    thread.run()
    assert thread.freed == [("r#0.1", LINGER_S)]
    assert (thread.exchange.stats().handles, thread.exchange.stats().bytes_used) == (0, 0)


async def test_blocks_of_which_nobody_has_heard_go_at_once(thread: Thread) -> None:
    given_up = Export("r", 70, asyncio.get_running_loop().create_future())
    given_up.handle.cancel()
    thread.exchange.expect_export("given up", given_up)
    thread.exchange.publish("given up", PARAMS)
    thread.exchange.publish("never expected", PARAMS)
    await asyncio.sleep(0)
    thread.run()
    assert thread.freed == [("given up", 0.0), ("never expected", 0.0)]
    assert thread.exchange.stats().handles == 0


@pytest.mark.parametrize(
    "changed",
    [{"remote_block_ids": [[1]]}, {"remote_block_ids": [[1, 2, -3]]}, {"remote_block_ids": [[1, 2, 2**24]]},
     {"remote_block_ids": []}, {"remote_port": 0}, {"remote_host": None}, {"tp_size": 0}, {"remote_engine_id": 1}],
    ids=str,
)  # fmt: skip
async def test_handles_that_vllm_would_die_of(thread: Thread, changed: dict[str, Any]) -> None:
    handle = await thread.published()
    with pytest.raises(WireError, match=handle.id):
        thread.exchange.expect_fetch("r#0.2", fetch_of(msgspec.structs.replace(handle, params=handle.params | changed)))
    with pytest.raises(WireError, match="shm"):
        thread.exchange.expect_fetch("r#0.2", fetch_of(msgspec.structs.replace(handle, transfer="shm")))


async def test_without_nixl_it_says_how_to_get_it(thread: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(Unservable, match=r"baton-serve\[nixl\]"):
        await thread.exchange.start(None)
