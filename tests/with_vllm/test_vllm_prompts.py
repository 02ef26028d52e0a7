"""Log probabilities of prompts from vLLM: those of vLLM alone, and of Hugging Face's model, however the prompt came to be computed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers

from pipeline.builtin import BUILTIN_MODEL, model_place
from pipeline.logprobs import PromptLogprob, unpack_prompt_logprobs
from pipeline.protocol import BackendInput, FinishReason, LLMEngineOutput, Log
from tests.contract.engines import Running, request_of, with_output
from tests.with_vllm.pairs import Pair, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

NOISE = 2e-3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_at(tmp_path_factory.mktemp("blocks")) as both:
        yield both


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_place(BUILTIN_MODEL), dtype=torch.float32).eval()


def scoring(name: str, length: int, top: int = 3, max_tokens: int = 4, seed: int = 0, **sampling: Any) -> BackendInput:
    return with_output(request_of(name, prompt(length, seed), max_tokens, **sampling), prompt_logprobs=top)


def told(request: BackendInput, outputs: Sequence[LLMEngineOutput]) -> list[PromptLogprob]:
    """What was told of the prompt, by one of its outputs."""
    [records] = [o.prompt_logprobs for o in outputs if o.request_id == request.request_id and o.prompt_logprobs]
    rows = [row for row in unpack_prompt_logprobs(records, request) if row is not None]
    assert len(rows) == len(request.token_ids) - 1
    return rows


def check(request: BackendInput, rows: Sequence[PromptLogprob], model: Any) -> None:
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([request.token_ids])).logits[0].double(), -1).numpy()
    differing = 0
    for token, row, expected in zip(request.token_ids[1:], rows, logs, strict=False):
        best = np.sort(expected)[::-1][: len(row.top)]
        assert row.logprob == pytest.approx(expected[token], abs=NOISE)
        assert [value for _, value in row.top] == pytest.approx(best, abs=NOISE)
        differing += row.rank != int((expected >= expected[token]).sum())
    assert differing <= len(rows) // 20, f"{differing} ranks of {len(rows)} differ, which near ties alone may"


def compare(found: Sequence[PromptLogprob], expected: Sequence[PromptLogprob]) -> None:
    assert [row.logprob for row in found] == pytest.approx([row.logprob for row in expected], abs=NOISE)


@pytest.mark.parametrize(("length", "top"), [(2, 0), (70, 1), (600, 20)])
async def test_they_are_the_model_s_own_cold_and_warm(pair: Pair, model: Any, length: int, top: int) -> None:
    for name in ("cold", "warm"):
        request = scoring(f"{name} {length}", length, top)
        await pair.prefill.generate(request)
        check(request, told(request, pair.prefill.outputs), model)
    assert not any(o.prompt_logprobs for o in pair.prefill.outputs if not o.token_ids)


@pytest.mark.parametrize("n", [1, 2])
async def test_handed_over_they_are_those_of_one_engine(pair: Pair, model: Any, n: int) -> None:
    here, over = (scoring(f"{name} {n}", 333, seed=n, n=n, temperature=1.0) for name in ("here", "over"))
    await pair.prefill.generate(here)
    await pair.decode.take_over(pair.prefill, over)
    rows = told(over, pair.decode.outputs)
    compare(rows, told(here, pair.prefill.outputs))
    check(over, rows, model)
    await pair.rests()


async def test_a_resumed_request_tells_them_again(pair: Pair, model: Any) -> None:
    request = scoring("whole", 90, max_tokens=9)
    [[tokens]] = await pair.prefill.generate(request)
    again, prefilled = scoring("again", 90, max_tokens=9), scoring("prefilled", 90, max_tokens=9)
    await pair.decode.engine.decode(again, None, Log(tokens=[tokens[:5]], finished=[None]))
    assert await pair.decode.finished(again) == [tokens[5:]]
    check(again, told(again, pair.decode.outputs), model)
    given = await pair.prefill.engine.prefill(prefilled, Log(tokens=[tokens[:1]], finished=[None]))
    assert given.kv is not None
    assert [(output.index, output.token_ids) for output in given.outputs] == [(0, [])]
    check(prefilled, told(prefilled, given.outputs), model)
    await pair.prefill.engine.release(given.kv.id)
    await pair.rests()


async def test_a_prompt_alone(pair: Pair, model: Any) -> None:
    request = scoring("alone", 40, max_tokens=0, n=2, temperature=1.0, seed=3)
    assert await pair.decode.generate(request) == [[[], []]]
    check(request, told(request, pair.decode.outputs), model)
    await ends_with_nothing(pair.prefill, scoring("alone here", 40, max_tokens=0))
    await pair.rests()


async def ends_with_nothing(running: Running, request: BackendInput) -> None:
    given = await running.engine.prefill(request, Log.empty(1))
    assert given.kv is None
    assert [(o.token_ids, o.finish_reason) for o in given.outputs] == [([], FinishReason.LENGTH)]
    assert told(request, given.outputs)
