"""LoRA adapters in vLLM: each is the model with the adapter's weights, and blocks never pass from one to another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from pipeline.errors import KVLost, Unservable
from pipeline.protocol import BackendInput, Log, RoutingHints
from tests.contract.engines import Running, request_of
from tests.with_vllm.adapters import write_adapter, write_merged
from tests.with_vllm.pairs import Pair, child, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

NAMES = ("", "one", "two")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(place / name, seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> AsyncIterator[Pair]:
    loras = f"one={folders['one']} two={folders['two']}"
    async with pair_at(tmp_path_factory.mktemp("blocks"), loras=loras) as both:
        yield both


def under(name: str, request_id: str, length: int = 70) -> BackendInput:
    asked = request_of(request_id, prompt(length), 24)
    return msgspec.structs.replace(asked, routing=RoutingHints(lora_name=name or None))


async def answer(running: Running, name: str, request_id: str) -> list[int]:
    [[tokens]] = await running.generate(under(name, request_id))
    return tokens


async def test_an_adapter_gives_what_the_model_with_its_weights_gives(
    pair: Pair, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = {name: await answer(pair.prefill, name, f"at first {name}") for name in NAMES}
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    assert found == {name: await answer(pair.prefill, name, f"from the cache {name}") for name in reversed(NAMES)}
    together = await pair.prefill.generate(*(under(name, f"together {name}") for name in NAMES))
    assert [tokens for [tokens] in together] == list(found.values())
    merged = write_merged(tmp_path / "merged", folders["one"])
    async with child("merged", tmp_path, str(merged)) as alone:
        assert await answer(alone, "", "merged") == found["one"]
    async with child("plain", tmp_path) as plain:
        assert await answer(plain, "", "plain") == found[""]
        assert plain.engine.info.layout == pair.prefill.engine.info.layout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [33, 64, 200])
async def test_handed_over_it_is_the_same_and_no_prompt_token_is_computed(pair: Pair, name: str, length: int) -> None:
    [here] = await pair.prefill.generate(under(name, f"here {name} {length}", length))
    await pair.rests()
    before = pair.decode.engine.stats().prompt_tokens_computed
    assert await pair.decode.take_over(pair.prefill, under(name, f"over {name} {length}", length)) == here
    await pair.rests()
    assert pair.decode.engine.stats().prompt_tokens_computed == before


async def test_blocks_of_other_weights_are_lost_and_computed_again(
    pair: Pair, folders: dict[str, Path], tmp_path: Path
) -> None:
    async with child("changed", tmp_path, loras=f"one={folders['three']}") as changed:
        for name, other in [("one", "one"), ("two", "one"), ("one", ""), ("", "one")]:
            prefilled = await pair.prefill.engine.prefill(under(name, f"{name} {other}"), Log.empty(1))
            assert prefilled.kv is not None
            with pytest.raises(KVLost) as error:
                await changed.engine.decode(under(other, f"{name} {other}"), prefilled.kv, Log.empty(1))
            assert error.value.reason == "layout"
            await pair.prefill.engine.release(prefilled.kv.id)
        assert await answer(changed, "one", "its own") != await answer(pair.prefill, "one", "ours")


async def test_one_that_is_not_here_is_refused_by_name(pair: Pair) -> None:
    with pytest.raises(Unservable, match=r"lora_name four: this engine has one, two"):
        await pair.decode.engine.decode(under("four", "four"), None, Log.empty(1))
    await pair.rests()


@pytest.mark.parametrize("files", [{}, {"adapter_config.json": "{}"}])
async def test_a_folder_without_an_adapter_is_told_at_the_start(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(Unservable, match="no PEFT adapter in"):
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(child("none", tmp_path, loras=f"one={tmp_path}"))
