"""Log probabilities from vLLM: those of the first token, of a resumed and of a constrained request are those of the whole one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pipeline.protocol import BackendInput, GuidedDecoding, LLMEngineOutput, Log, OutputOptions
from tests.contract.engines import Running, request_of
from tests.with_vllm.pairs import Pair, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

TOP = 3
NOISE = 2e-3
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5},
    "unseeded": {"temperature": 1.0},
    "constrained": {"guided_decoding": GuidedDecoding(regex="[a-z ]{40,}")},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_at(tmp_path_factory.mktemp("blocks")) as both:
        yield both


def asked(name: str, top: int | None, **sampling: Any) -> BackendInput:
    plain = request_of(name, prompt(70), 20, **sampling)
    return msgspec.structs.replace(plain, output_options=OutputOptions(logprobs=top))


def rows_of(outputs: Iterable[LLMEngineOutput], name: str) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Token, its log probability, and the likeliest at its place."""
    return [
        row
        for output in outputs
        if output.request_id == name
        for row in zip(output.token_ids, output.log_probs or [], output.top_logprobs or [], strict=True)
    ]


async def whole_of(running: Running, request: BackendInput) -> list[tuple[int, float, list[tuple[int, float]]]]:
    await running.generate(request)
    return rows_of(running.outputs, request.request_id)


@pytest.mark.parametrize("kind", KINDS)
async def test_each_token_has_its_own_and_the_likeliest_beside_it(pair: Pair, kind: str) -> None:
    beside = asked("beside it", 7)  # another request of the step that asks for more
    await pair.prefill.engine.decode(beside, None, Log.empty(1))
    rows = await whole_of(pair.prefill, asked(f"whole {kind}", TOP, **KINDS[kind]))
    assert len(rows) == 20
    for token, logprob, top in rows:
        assert len(top) == TOP
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert logprob <= top[0][1] + 1e-6 <= 1e-5
        if "temperature" not in KINDS[kind]:
            assert token == top[0][0]
        if token in dict(top):
            assert dict(top)[token] == pytest.approx(logprob, abs=1e-6)
    await pair.prefill.finished(beside)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unseeded"])
async def test_handed_over_and_resumed_they_are_the_same(pair: Pair, kind: str) -> None:
    request = asked(f"here {kind}", TOP, **KINDS[kind])
    whole = await whole_of(pair.prefill, request)
    over = msgspec.structs.replace(request, request_id=f"over {kind}")
    prefilled = await pair.prefill.engine.prefill(over, Log.empty(1))
    assert prefilled.kv is not None
    first = rows_of(prefilled.outputs, over.request_id)
    await pair.decode.engine.decode(over, prefilled.kv, Log(tokens=[[first[0][0]]], finished=[None]))
    await pair.prefill.engine.release(prefilled.kv.id)
    await pair.decode.finished(over)
    compare(first + rows_of(pair.decode.outputs, over.request_id), whole)
    again = msgspec.structs.replace(request, request_id=f"again {kind}")
    await pair.decode.engine.decode(again, None, Log(tokens=[[token for token, _, _ in whole[:9]]], finished=[None]))
    await pair.decode.finished(again)
    compare(rows_of(pair.decode.outputs, again.request_id), whole[9:])


def compare(found: list[tuple[int, float, Any]], expected: list[tuple[int, float, Any]]) -> None:
    assert [token for token, _, _ in found] == [token for token, _, _ in expected]
    assert [value for _, value, _ in found] == pytest.approx([value for _, value, _ in expected], abs=NOISE)


async def test_none_are_given_where_none_are_asked_for(pair: Pair) -> None:
    request = asked("none", None)
    await pair.prefill.generate(request)
    assert all(output.log_probs is None for output in pair.prefill.outputs if output.request_id == "none")
    rows = await whole_of(pair.prefill, asked("only its own", 0))
    assert [top for _, _, top in rows] == [[]] * 20
