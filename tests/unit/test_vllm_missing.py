"""A worker that is to run vLLM where there is none says so before it takes a request."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.config import EngineSettings, PoolSettings, TransferSettings
from pipeline.errors import Unservable
from workers.engine import load_engine
from workers.transfers.block_transfer import BlockTransfer


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
async def test_vllm_that_is_not_installed_is_said_with_what_to_do(tmp_path: Path) -> None:
    transfer = BlockTransfer(TransferSettings(dir=str(tmp_path)), "w", exports=False)
    engine = load_engine(PoolSettings(engine="vllm"), EngineSettings(), transfer)
    with pytest.raises(Unservable, match="pip install vllm"):
        await engine.start()
    await engine.close()
