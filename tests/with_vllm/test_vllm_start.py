"""How vLLM starts: with the settings that nobody has set, without compiling where that is asked for, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pipeline.errors import Unservable
from pipeline.protocol import OutputOptions
from tests.contract.engines import request_of
from tests.with_vllm.pairs import child, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio, pytest.mark.timeout(200)]


async def test_unset_memory_leaves_room_for_others_and_eager_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    asked = msgspec.structs.replace(request_of("scored", prompt(40), 3, n=2), output_options=OutputOptions(logprobs=2))
    async with child("alone", tmp_path, kv_cache_bytes=0, enforce_eager=True) as running:
        info = running.engine.info
        assert 2**30 - 2**21 < info.num_blocks * info.block_nbytes <= 2**30
        await running.generate(asked)
    assert not [path for path in compiled.rglob("*") if path.is_file()]


async def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-model")
    with pytest.raises(Unservable, match="no-model: there is no such folder"):
        async with child("missing", tmp_path, model=missing):
            pass
    assert not list(tmp_path.iterdir()), "shared memory was left behind"
