"""The same request on vLLM and on the torch engine: the same tokens and the same log probabilities, whatever shapes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pipeline.builtin import BUILTIN_MODEL
from pipeline.protocol import BackendInput, FinishReason, GuidedDecoding, LLMEngineOutput
from pipeline.tokenizer import Tokenizer
from tests.contract.engines import Engines, Running, request_of, stopping, with_output
from tests.with_vllm.pairs import child, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

NOISE = 2e-3
FIELDS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.4},
    "presence and frequency": {"presence_penalty": 0.8, "frequency_penalty": 0.6},
    "bias": {"logit_bias": {"70": 3.0, "300": -100.0}},
    "all": {
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "logit_bias": {"70": 2.0, "90": 2.0},
    },
    "regex": {"guided_decoding": GuidedDecoding(regex="[a-z ]{25,}")},
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "seed": 5},
    "min-p": {"temperature": 1.5, "seed": 6, "min_p": 0.1},
    "cut": {"temperature": 1.5, "seed": 7, "min_p": 0.02, "top_k": 40, "top_p": 0.8},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Running, Running]]:
    place = tmp_path_factory.mktemp("blocks")
    async with child("alike", place) as vllm, Engines("torch", BUILTIN_MODEL, place).engine() as torch:
        yield vllm, torch


def asked(field: str, how: str) -> BackendInput:
    plain = request_of(f"{field} {how}", prompt(60, len(field)), 24, **FIELDS[field], **SAMPLING[how])
    ending = msgspec.structs.replace(plain, eos_token_ids=Tokenizer.load(BUILTIN_MODEL).eos_token_ids)
    return with_output(ending, logprobs=3)


def values(outputs: list[LLMEngineOutput], name: str) -> list[list[float]]:
    """The log probability of each token and of the likeliest at its place."""
    return [
        [value, *(other for _, other in top)]
        for output in outputs
        if output.request_id == name
        for value, top in zip(output.log_probs or [], output.top_logprobs or [], strict=True)
    ]


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("field", FIELDS)
async def test_tokens_and_log_probabilities_are_the_same(both: tuple[Running, Running], field: str, how: str) -> None:
    vllm, torch = both
    request = asked(field, how)
    expected, found = await vllm.generate(request), await torch.generate(request)
    assert found == expected
    assert torch.ends[request.request_id, 0] == vllm.ends[request.request_id, 0]
    told = values(torch.outputs, request.request_id)
    assert len(told) == len(found[0][0])
    for row, other in zip(told, values(vllm.outputs, request.request_id), strict=True):
        assert row == pytest.approx(other, abs=NOISE)


async def test_behind_a_grammar_an_answer_ends_although_ends_are_to_be_ignored(both: tuple[Running, Running]) -> None:
    request = asked("none", "greedy")
    choice = GuidedDecoding(choice=["the first of them", "the second one", "none"])
    options = msgspec.structs.replace(request.sampling_options, guided_decoding=choice)
    ignoring = msgspec.structs.replace(request, request_id="ignoring", sampling_options=options)
    ignoring = stopping(ignoring, ignore_eos=True)
    for engine in both:
        [[tokens]] = await engine.generate(ignoring)
        assert tokens[-1] in request.eos_token_ids
        assert engine.ends["ignoring", 0] is FinishReason.EOS
