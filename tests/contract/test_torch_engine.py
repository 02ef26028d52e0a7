"""What only the torch engine promises: which models it refuses, sampling, and failures that stay where they happened."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.config import EngineSettings, PoolSettings, TorchSettings, TransferSettings
from pipeline.errors import EngineDied, KVLost, Unservable
from pipeline.protocol import FinishReason, KVHandle, Log, SamplingOptions
from tests.contract.engines import Engines, Running, prompt, request_of, write_model
from workers.engine import load_engine
from workers.engines.paged.engine import PagedEngine
from workers.engines.paged.runner import Draw, RowFailure
from workers.engines.torch.sampling import choose
from workers.transfer import BlockSink
from workers.transfers.block_transfer import BlockTransfer


@pytest.fixture
def engines(tmp_path: Path, short_dir: Path) -> Engines:
    return Engines("torch", str(write_model(tmp_path)), short_dir)


async def refusal(folder: Path, place: Path, **fields: Any) -> str:
    with pytest.raises(Unservable) as refused:
        async with Engines("torch", str(folder), place).engine(**fields):
            pass
    return str(refused.value)


async def test_models_that_it_cannot_serve_are_refused_at_start(tmp_path: Path, short_dir: Path) -> None:
    sliding = write_model(tmp_path / "mistral", "mistral", sliding_window=128)
    assert "slides over 128 tokens; with max_model_len = 128" in await refusal(sliding, short_dir)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = write_model(tmp_path / "dynamic", rope_parameters=rope)
    assert "rotary embedding is dynamic" in await refusal(dynamic, short_dir)
    softcapped = write_model(tmp_path / "gemma2", "gemma2", layer_types=["full_attention"] * 2)
    assert "softcap" in await refusal(softcapped, short_dir)
    for family, reason in [("t5", "encoder-decoder"), ("vit", "not a decoder"), ("deepseek_v3", "MLA")]:
        transformers.AutoConfig.for_model(family).save_pretrained(tmp_path / family)
        assert reason in await refusal(tmp_path / family, short_dir)
    encoder = write_model(tmp_path / "bert", "bert")
    assert "does not run on paged attention" in await refusal(encoder, short_dir)
    assert "could not be loaded" in await refusal(tmp_path / "nothing", short_dir)


async def test_equal_shapes_with_other_weights_are_another_layout(
    engines: Engines, tmp_path: Path, short_dir: Path
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(engines.model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.5)
    other.save_pretrained(tmp_path / "other")
    async with engines.engine() as one, Engines("torch", str(tmp_path / "other"), short_dir).engine() as two:
        assert one.engine.info.layout != two.engine.info.layout
        kv = (await one.engine.prefill(request_of("r", prompt(20)), Log.empty(1))).kv
        with pytest.raises(KVLost) as lost:
            await two.engine.decode(request_of("r", prompt(20)), kv, Log(tokens=[[1]], finished=[None]))
        assert lost.value.reason == "layout"


class SpoilingTransfer(BlockTransfer):
    """Delivers what is not a number instead of the keys of one request."""

    async def fetch(self, handle: KVHandle, into: BlockSink) -> None:
        if handle.request_id == "spoiled":
            into.scatter(memoryview(np.full(into.nbytes // 4, np.nan, dtype=np.float32)).cast("B"))
        else:
            await super().fetch(handle, into)


async def test_a_request_whose_logits_are_not_finite_fails_alone(engines: Engines, short_dir: Path) -> None:
    settings = TransferSettings(dir=str(short_dir), arena_bytes=2**23, slab_bytes=2**16)
    section = EngineSettings(torch=TorchSettings(num_blocks=16))
    engine = load_engine(PoolSettings(model=engines.model), section, SpoilingTransfer(settings, "spoiling"))
    assert isinstance(engine, PagedEngine)
    await engine.start()
    decode = Running(engine)
    async with engines.engine() as whole:
        sound = [request_of("sound", prompt(40), 30), request_of("after", prompt(100, 1), 30)]
        expected = await whole.generate(*sound)
        await engine.decode(sound[0], None, Log.empty(1))
        spoiled = request_of("spoiled", prompt(90, 2), 30)
        kv = (await whole.engine.prefill(spoiled, Log.empty(1))).kv
        await engine.decode(spoiled, kv, Log(tokens=[[1]], finished=[None]))
        await decode.until(lambda: ("spoiled", 0) in decode.ends)
        assert decode.ends["spoiled", 0] is FinishReason.ERROR
        # Its blocks are taken again, also partly filled: nothing of what they held shows.
        assert [await decode.finished(sound[0]), *await decode.generate(sound[1])] == expected
        assert await decode.generate(request_of("fresh", prompt(90, 2), 30)) == await whole.generate(spoiled)
    await engine.close()
    await decode.reading


class LateTransfer(BlockTransfer):
    """Loses what it is to fetch, later."""

    def __init__(self, settings: TransferSettings, name: str) -> None:
        super().__init__(settings, name)
        self.has_begun, self.may_fail = asyncio.Event(), asyncio.Event()

    async def fetch(self, handle: KVHandle, into: BlockSink) -> None:
        self.has_begun.set()
        await self.may_fail.wait()
        raise KVLost("its owner has gone", reason="gone")


async def test_a_fetch_that_fails_when_nobody_waits_for_it_is_no_news(engines: Engines, short_dir: Path) -> None:
    transfer = LateTransfer(TransferSettings(dir=str(short_dir), arena_bytes=2**23, slab_bytes=2**16), "late")
    engine = load_engine(
        PoolSettings(model=engines.model), EngineSettings(torch=TorchSettings(num_blocks=16)), transfer
    )
    assert isinstance(engine, PagedEngine)
    await engine.start()
    said = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    async with engines.engine() as whole:
        request = request_of("r", prompt(40))
        kv = (await whole.engine.prefill(request, Log.empty(1))).kv
        call = asyncio.create_task(engine.decode(request, kv, Log(tokens=[[1]], finished=[None])))
        await transfer.has_begun.wait()
        call.cancel()
        await asyncio.wait([call])
        del call
        transfer.may_fail.set()
        await asyncio.sleep(0.01)
    await engine.close()
    gc.collect()
    assert said == []
    assert engine.stats().blocks_used == 0


async def test_a_step_that_fails_as_a_whole_ends_the_engine(engines: Engines) -> None:
    async with engines.engine() as one:
        outside = request_of("outside", [10**6])  # no such token: the embedding fails
        with pytest.raises(EngineDied, match="IndexError"):
            await asyncio.gather(one.engine.prefill(outside, Log.empty(1)), one.reading)
        with pytest.raises(EngineDied):
            await one.engine.decode(request_of("r", prompt(10)), None, Log.empty(1))
        await asyncio.wait([one.reading])
        one.reading = asyncio.get_running_loop().create_future()
        one.reading.set_result(None)


def draw(**fields: Any) -> Draw:
    index = fields.pop("index", 0)
    return Draw(SamplingOptions(**fields), choice=0, index=index, banned=(), eos_token_ids=())


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    rows = logits.repeat(300, 1)
    seen = lambda **fields: set(choose(rows.clone(), [draw(seed=s, **fields) for s in range(300)]))  # noqa: E731
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.8) == {1, 3}
    assert seen(top_p=0.81) == {1, 2, 3}
    assert seen(top_k=1) == seen(top_p=1e-9) == seen(temperature=1e-3) == {1}


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    count = 8000
    tokens = choose(torch.log(probabilities).repeat(count, 1), [draw(seed=7, index=index) for index in range(count)])
    frequencies = np.bincount(np.array(tokens), minlength=4) / count
    assert np.abs(frequencies - probabilities.numpy()).max() < 0.02


def test_banned_tokens_never_come_and_what_is_not_finite_fails_alone() -> None:
    logits = torch.tensor([[5.0, 1.0], [5.0, 1.0], [float("nan"), 1.0]])
    draws = [Draw(SamplingOptions(temperature=0), 0, 0, banned, ()) for banned in ((), (0,), ())]
    first, second, third = choose(logits, draws)
    assert (first, second) == (0, 1)
    assert isinstance(third, RowFailure)
