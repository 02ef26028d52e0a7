"""What vLLM's thread and the event loop share of a hand-over: what leaves in the loop is still there for a step that has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import TransferSettings
from pipeline.protocol import KVHandle
from tests.unit.test_vllm_nixl_exchange import PARAMS
from workers.engines.vllm.exchange import Exchange, Export, Fetch
from workers.engines.vllm.nixl_exchange import TRANSFER, NixlExchange
from workers.transfers.block_transfer import BlockTransfer

HANDLE = KVHandle(
    id="0" * 32, request_id="r", owner="prefill@host.1", transfer=TRANSFER, layout="layout",
    num_tokens=70, num_blocks=3, nbytes=96, cached_tokens=0, params=PARAMS,
)  # fmt: skip


@pytest.mark.parametrize("kind", [Exchange, NixlExchange])
async def test_a_request_that_leaves_during_a_step_leaves_after_it(kind: type[Exchange], tmp_path: Path) -> None:
    """vLLM asks what a request fetches, allocates its blocks and asks again; in between it may be cancelled."""
    loop, orders = asyncio.get_running_loop(), list[Callable[[], None]]()
    transfer = BlockTransfer(TransferSettings(dir=str(tmp_path)), "decode@host.1")
    exchange = kind(transfer, lambda: "layout", lambda moved: None, orders.append)
    fetch, export = Fetch(HANDLE, loop.create_future()), Export("r", 70, loop.create_future())
    exchange.expect_fetch("in", fetch)
    exchange.expect_export("out", export)
    assert exchange.pending_fetch("in") is fetch
    for key in ("in", "out"):
        exchange.forget(key)
    assert exchange.pending_fetch("in") is fetch
    exchange.begin_fetch("in", needs_blocks=True)
    assert exchange.has_export("out")
    for order in orders:
        order()
    assert exchange.pending_fetch("in") is None
    assert not exchange.has_export("out")
