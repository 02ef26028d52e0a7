"""Log probabilities of prompts in the torch engine, beside Hugging Face's logits: whole, in chunks, after a preemption, handed over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.errors import Unservable
from pipeline.logprobs import PromptLogprob, unpack_prompt_logprobs
from pipeline.protocol import BackendInput, FinishReason, LLMEngineOutput, Log
from tests.contract.engines import (
    VOCABULARY,
    Engines,
    Running,
    prompt,
    request_of,
    require_cuda,
    with_output,
    write_model,
)
from workers.engines.torch import logprobs

TOLERANCE = 2e-4  # of logarithms whose logits were summed in float32, in another order
Values = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["torch", pytest.param("torch-cuda", marks=pytest.mark.gpu)])
def engines(request: pytest.FixtureRequest, model_dir: Path, short_dir: Path) -> Engines:
    if request.param == "torch-cuda":
        require_cuda()
    return Engines(request.param, str(model_dir), short_dir)


def logs_of(folder: str, tokens: Sequence[int]) -> Values:
    """The logarithms of the model's own probabilities of what follows each token but the last, [tokens - 1, vocabulary]."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logs: Values = torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0, :-1].double(), -1).numpy()
    return logs


def scoring(name: str, token_ids: list[int], top: int = 3, max_tokens: int = 4, **sampling: Any) -> BackendInput:
    return with_output(request_of(name, token_ids, max_tokens, **sampling), prompt_logprobs=top)


def told(request: BackendInput, outputs: Sequence[LLMEngineOutput]) -> list[PromptLogprob]:
    """What was told of the prompt: once, with the first of its outputs."""
    own = [output for output in outputs if output.request_id == request.request_id]
    assert [bool(output.prompt_logprobs) for output in own] == [True] + [False] * (len(own) - 1)
    first, *rows = unpack_prompt_logprobs(own[0].prompt_logprobs, request)
    assert first is None
    known = [row for row in rows if row is not None]
    assert len(known) == len(rows) == len(request.token_ids) - 1
    return known


def check(request: BackendInput, rows: Sequence[PromptLogprob], logs: Values) -> int:
    """Each row says what the model says. Returns how many ranks differ, which only near ties may."""
    near_ties = 0
    for token, row, expected in zip(request.token_ids[1:], rows, logs, strict=True):
        assert row.logprob == pytest.approx(expected[token], abs=TOLERANCE)
        greater = (
            int((expected > expected[token] + TOLERANCE).sum()),
            int((expected >= expected[token] - TOLERANCE).sum()),
        )
        assert greater[0] < row.rank <= greater[1]
        near_ties += row.rank != int((expected >= expected[token]).sum())
        best = np.sort(expected)[::-1][: len(row.top)]
        assert [value for _, value in row.top] == pytest.approx(best, abs=TOLERANCE)
        assert [expected[likely] for likely, _ in row.top] == pytest.approx(best, abs=2 * TOLERANCE)
    return near_ties


@pytest.mark.parametrize("top", [0, 1, 20])
async def test_they_are_the_model_s_own(engines: Engines, top: int) -> None:
    requests = [scoring(f"r{size}", prompt(size, size), top) for size in (2, 17, 100, 300)]
    plain = request_of("plain", prompt(40, 9))
    async with engines.engine() as running:
        generated = await running.generate(*requests, plain)
        assert [len(one[0]) for one in generated] == [4, 4, 4, 4, 12]
        near_ties = sum(
            check(request, told(request, running.outputs), logs_of(engines.model, request.token_ids))
            for request in requests
        )
        assert near_ties <= 1, f"{near_ties} ranks of 415 differ"
        assert not any(output.prompt_logprobs for output in running.outputs if output.request_id == "plain")


async def test_chunks_slices_and_a_warm_prefix_cache_tell_the_same(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "SLICE_NUMBERS", 10 * VOCABULARY)
    request, again = scoring("r", prompt(300, 4)), scoring("again", prompt(300, 4))
    async with engines.engine(max_num_batched_tokens=64, max_num_seqs=8) as running:
        await running.generate(request_of("warm", prompt(300, 4)))
        computed = running.engine.stats().prompt_tokens_computed
        await running.generate(request)
        assert running.engine.stats().prompt_tokens_computed == computed + 300  # nothing of it came from the cache
        await running.generate(again, request_of("other", prompt(200, 5)))
        logs = logs_of(engines.model, request.token_ids)
        assert check(request, told(request, running.outputs), logs) <= 1
        assert check(again, told(again, running.outputs), logs) <= 1
        assert await running.engine.decode(request_of("warm again", prompt(300, 4)), None, Log.empty(1)) > 0


async def test_a_preempted_prompt_is_told_whole(engines: Engines) -> None:
    long, early = scoring("long", prompt(200, 1), max_tokens=60), request_of("early", prompt(20, 2), 120)
    async with engines.engine(num_blocks=20, max_num_batched_tokens=24, max_num_seqs=8) as running:
        await running.generate(early, long)
        assert running.engine.stats().preemptions > 0
        assert check(long, told(long, running.outputs), logs_of(engines.model, long.token_ids)) <= 1


async def test_the_choices_of_a_request_share_them(engines: Engines) -> None:
    request = scoring("r", prompt(50, 3), n=3, temperature=1.0, seed=4)
    async with engines.engine() as running:
        await running.generate(request)
        assert check(request, told(request, running.outputs), logs_of(engines.model, request.token_ids)) <= 1
        assert {output.choice for output in running.outputs} == {0, 1, 2}


async def test_who_prefills_tells_them_and_who_fetches_does_not(engines: Engines) -> None:
    request = scoring("r", prompt(90, 6), n=2, temperature=1.0, seed=1)
    async with engines.engine() as prefiller, engines.engine() as decoder:
        handed = await decoder.take_over(prefiller, request)
        rows = told(request, decoder.outputs)
        alone = with_output(request_of("alone", prompt(90, 6), 4, n=2, temperature=1.0, seed=1), prompt_logprobs=3)
        assert await prefiller.generate(alone) == [handed]
        assert rows == told(alone, prefiller.outputs)
        assert check(request, rows, logs_of(engines.model, request.token_ids)) <= 1


async def test_a_resumed_request_tells_them_again(engines: Engines) -> None:
    """Its blocks are lost, and perhaps Redis lost what was told, too."""
    request = scoring("r", prompt(70, 8), max_tokens=9)
    async with engines.engine() as running:
        [[tokens]] = await running.generate(request)
        rows = told(request, running.outputs)
        running.outputs.clear()
        await running.engine.decode(request, None, Log(tokens=[tokens[:5]], finished=[None]))
        await running.until(lambda: len(running.tokens["r", 0]) == 9 + 4)
        check(request, told(request, running.outputs), logs_of(engines.model, request.token_ids))
        assert [row.logprob for row in told(request, running.outputs)] == pytest.approx(
            [row.logprob for row in rows], abs=1e-4
        )
        prefilled = await running.engine.prefill(scoring("p", prompt(70, 8)), Log(tokens=[tokens[:1]], finished=[None]))
        assert [(output.index, output.token_ids) for output in prefilled.outputs] == [(0, [])]
        assert len(unpack_prompt_logprobs(prefilled.outputs[0].prompt_logprobs, request)) == 70


@pytest.mark.parametrize("n", [1, 2])
async def test_a_prompt_alone(engines: Engines, n: int) -> None:
    """`max_tokens` 0: nothing is generated."""
    request = scoring("r", prompt(33, 5), max_tokens=0, n=n, temperature=1.0, seed=3)
    async with engines.engine() as running:
        assert await running.generate(request) == [[[]] * n]
        assert [output.finish_reason for output in running.outputs] == [FinishReason.LENGTH] * n
        assert check(request, told(request, running.outputs), logs_of(engines.model, request.token_ids)) <= 1
        assert running.engine.stats().output_tokens == 0
        prefilled = await running.engine.prefill(scoring("p", prompt(33, 5), max_tokens=0), Log.empty(1))
        assert prefilled.kv is None
        assert [(o.token_ids, o.finish_reason) for o in prefilled.outputs] == [([], FinishReason.LENGTH)]
        await rests(running)


async def rests(running: Running) -> None:
    stats = running.engine.stats()
    assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.parametrize(("family", "fields"), [("granite", {"logits_scaling": 3.0}), ("qwen3", {})])
async def test_other_models_make_logits_in_their_own_way(
    family: str, fields: dict[str, Any], tmp_path: Path, short_dir: Path
) -> None:
    engines, request = (
        Engines("torch", str(write_model(tmp_path, family, **fields)), short_dir),
        scoring("r", prompt(60, 2)),
    )
    async with engines.engine() as running:
        await running.generate(request)
        assert check(request, told(request, running.outputs), logs_of(engines.model, request.token_ids)) <= 1


async def test_the_mock_engine_refuses_them(short_dir: Path) -> None:
    async with Engines("mock", "mock", short_dir).engine() as running:
        with pytest.raises(Unservable, match=r"output_options\.prompt_logprobs"):
            await running.engine.decode(scoring("r", prompt(9)), None, Log.empty(1))
