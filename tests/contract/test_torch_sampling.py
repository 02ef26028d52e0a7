"""Penalties, bias, min-p, min_tokens and log probabilities in the torch engine, beside formulas in float64 over Hugging Face's logits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from pipeline.errors import Unservable
from pipeline.logprobs import MOST
from pipeline.protocol import BackendInput, Log, SamplingOptions
from tests.contract.engines import VOCABULARY, Engines, Running, prompt, request_of, stopping, with_output, write_model
from workers.engines.paged.randomness import uniforms
from workers.engines.paged.runner import Draw
from workers.engines.paged.shaping import TokenCounts
from workers.engines.torch.penalties import penalize
from workers.engines.torch.sampling import choose, drop_unlikely

Values = np.ndarray[Any, np.dtype[np.float64]]

FIELDS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "encouraged repetition": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative": {"frequency_penalty": -0.5, "presence_penalty": -0.7},
    "bias": {"logit_bias": {"7": 4.0, "9": -100.0, "255": 2.5, "0": -1.0}},
    "all": {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {"3": 5.0},
    },
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.3, "seed": 5},
    "min-p": {"temperature": 1.5, "seed": 6, "min_p": 0.2},
    "cut": {"temperature": 1.5, "seed": 7, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engines(model_dir: Path, short_dir: Path) -> Engines:
    return Engines("torch", str(model_dir), short_dir)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def logits_of(model: Any, tokens: Sequence[int]) -> Values:
    """The model's own logits after each of these tokens, [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: Values = model(torch.tensor([list(tokens)])).logits[0].double().numpy()
    return logits


def shaped(logits: Values, request: BackendInput, output: list[int]) -> Values:
    """The logits of one position as the request's fields change them."""
    options, stop = request.sampling_options, request.stop_conditions
    row = logits.copy()
    if len(output) < (stop.min_tokens or 0):
        row[[*request.eos_token_ids, *(stop.stop_token_ids or [])]] = -np.inf
    for token, bias in (options.logit_bias or {}).items():
        row[int(token)] += bias
    for token in {*request.token_ids, *output}:
        row[token] *= options.repetition_penalty if row[token] <= 0 else 1 / options.repetition_penalty
    for token, times in Counter(output).items():
        row[token] -= options.frequency_penalty * times + options.presence_penalty
    return row


def weights_of(row: Values, options: SamplingOptions) -> Values:
    """Temperature, min-p, top-k and top-p, one after the other, as vLLM has them."""
    weights: Values = np.exp((row - row.max()) / options.temperature)
    weights[weights < options.min_p * weights.max()] = 0
    order = np.argsort(-weights, kind="stable")
    weights[order[options.top_k or len(row) :]] = 0
    before = np.cumsum(weights[order]) - weights[order]
    left_out = before >= options.top_p * weights.sum()
    weights[order[left_out]] = 0
    return weights / weights.sum()


def check(model: Any, request: BackendInput, choices: Sequence[list[int]]) -> None:
    """Each token is the one that the formula chooses, but for the noise of float32 logits."""
    options = request.sampling_options
    for choice, tokens in enumerate(choices):
        rows = logits_of(model, [*request.token_ids, *tokens])[len(request.token_ids) - 1 :]
        for index, token in enumerate(tokens):
            row = shaped(rows[index], request, tokens[:index])
            if options.temperature == 0:
                assert row[token] >= row.max() - 1e-4, (choice, index)
                continue
            weights = weights_of(row, options)
            [point] = uniforms([Draw(options, choice, index, (), ())])
            end = np.cumsum(weights)[token]
            assert end - weights[token] - 1e-4 <= point <= end + 1e-4, (choice, index)


def asked(name: str, field: str, how: str, length: int = 40, max_tokens: int = 30, n: int = 3) -> BackendInput:
    return request_of(name, prompt(length, len(field)), max_tokens, n=n, **FIELDS[field], **SAMPLING[how])


def renamed(request: BackendInput, name: str) -> BackendInput:
    return msgspec.structs.replace(request, request_id=name)


@pytest.mark.parametrize("how", SAMPLING)
async def test_each_field_does_what_its_formula_says(engines: Engines, model: Any, how: str) -> None:
    requests = [asked(f"{field} {how}", field, how) for field in FIELDS]
    async with engines.engine() as one:
        together = await one.generate(*requests)
    for request, choices in zip(requests, together, strict=True):
        check(model, request, choices)
    distinct = {tuple(map(tuple, choices)) for choices in together}
    assert len(distinct) >= len(FIELDS) - 2, "the fields make a difference"


async def test_min_tokens_holds_the_ends_back(engines: Engines, model: Any) -> None:
    request = asked("r", "frequency", "seeded", n=1)
    async with engines.engine() as one:
        [[free]] = await one.generate(request)
        ends = stopping(renamed(request, "s"), min_tokens=9, stop_token_ids=[free[2], 10**6])
        ends = msgspec.structs.replace(ends, eos_token_ids=[free[4], 2**31])  # ids that the model does not have, too
        [choices] = await one.generate(ends)
        check(
            model, msgspec.structs.replace(stopping(ends, stop_token_ids=[free[2]]), eos_token_ids=[free[4]]), choices
        )
        assert not {free[2], free[4]} & set(choices[0][:9])


def varied() -> list[BackendInput]:
    """All fields and ways to sample, of several lengths, all of them scored."""
    requests = [
        asked(f"{field} {how}", field, how, length, 24, n=1 + 2 * (length % 2))
        for length, field in zip((16, 33, 50, 61, 20, 47, 39, 31), FIELDS, strict=True)
        for how in ("greedy", "cut")
    ]
    return [with_output(request, logprobs=number % 5) for number, request in enumerate(requests)]


Rows = list[tuple[int, float, list[tuple[int, float]]]]


def scores(running: Running, name: str, n: int) -> list[Rows]:
    """Token, log probability and likeliest of each token of each choice."""
    rows: list[Rows] = [[] for _ in range(n)]
    for output in running.outputs:
        if output.request_id == name:
            rows[output.choice] += zip(output.token_ids, output.log_probs or [], output.top_logprobs or [], strict=True)
    return rows


def assert_equal(found: Sequence[Rows], expected: Sequence[Rows]) -> None:
    for choice, others in zip(found, expected, strict=True):
        assert [row[0] for row in choice] == [row[0] for row in others]
        assert [[token for token, _ in row[2]] for row in choice] == [[token for token, _ in row[2]] for row in others]
        values = [[row[1], *(value for _, value in row[2])] for row in choice]
        for row, other in zip(values, [[row[1], *(value for _, value in row[2])] for row in others], strict=True):
            assert row == pytest.approx(other, abs=1e-4)


async def test_nothing_depends_on_company_on_blocks_on_a_resume_or_on_who_prefilled(engines: Engines) -> None:
    requests = varied()
    async with (
        engines.engine() as together,
        engines.engine(num_blocks=24, prefix_cache=False) as small,
        engines.engine() as prefill,
        engines.engine() as decode,
    ):
        await together.generate(*requests)
        whole = {r.request_id: scores(together, r.request_id, r.sampling_options.n) for r in requests}
        for request in requests:
            n = request.sampling_options.n
            alone = renamed(request, f"alone {request.request_id}")
            await together.generate(alone)
            assert_equal(scores(together, alone.request_id, n), whole[request.request_id])
        await asyncio.gather(*(small.engine.decode(r, None, Log.empty(r.sampling_options.n)) for r in requests))
        for request in requests:
            await small.finished(request)
            assert_equal(scores(small, request.request_id, request.sampling_options.n), whole[request.request_id])
        assert small.engine.stats().preemptions > 0
        for request in requests:
            n, rows = request.sampling_options.n, whole[request.request_id]
            tokens = await decode.take_over(prefill, request)
            assert tokens == [[row[0] for row in choice] for choice in rows]
            assert_equal(scores(decode, request.request_id, n), rows)
            again = renamed(request, f"resumed {request.request_id}")
            log = Log(tokens=[tokens[choice][: 5 * choice + 7] for choice in range(n)], finished=[None] * n)
            await decode.engine.decode(again, None, log)
            await decode.finished(again)
            assert_equal(scores(decode, again.request_id, n), [choice[5 * c + 7 :] for c, choice in enumerate(rows)])


async def test_log_probabilities_are_the_models_whatever_is_done_to_them(engines: Engines, model: Any) -> None:
    request = with_output(asked("r", "all", "cut", n=2), logprobs=MOST)
    async with engines.engine() as one:
        choices = (await one.generate(request))[0]
        for tokens, rows in zip(choices, scores(one, "r", 2), strict=True):
            logits = torch.from_numpy(logits_of(model, [*request.token_ids, *tokens])[len(request.token_ids) - 1 : -1])
            logs = torch.log_softmax(logits, dim=-1)
            for (token, value, top), own in zip(rows, logs, strict=True):
                assert value == pytest.approx(float(own[token]), abs=1e-4)
                best = own.topk(MOST)
                assert [got for _, got in top] == pytest.approx(best.values.tolist(), abs=1e-4)
                assert {got for got, _ in top} == set(best.indices.tolist())


async def test_none_are_told_where_none_are_asked_for(engines: Engines) -> None:
    async with engines.engine() as one:
        await one.generate(request_of("none", prompt(20)), with_output(request_of("own", prompt(20)), logprobs=0))
        assert all(output.log_probs is None for output in one.outputs if output.request_id == "none")
        assert [top for _, _, top in scores(one, "own", 1)[0]] == [[]] * 12


@pytest.mark.parametrize("key", ["256", "-1", "x"])
async def test_a_bias_of_what_is_no_token_is_refused(engines: Engines, key: str) -> None:
    async with engines.engine() as one:
        with pytest.raises(Unservable, match="request r: logit_bias"):
            await one.engine.decode(request_of("r", prompt(9), logit_bias={key: 1.0}), None, Log.empty(1))


def test_repetition_and_min_p_are_those_of_hugging_face() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, VOCABULARY, generator=generator) * 3
    rows = [SamplingOptions(repetition_penalty=penalty) for penalty in (1.5, 0.7, 2.0)]
    seen = torch.randint(VOCABULARY, (3, 50), generator=generator)
    expected = torch.cat(
        [
            transformers.RepetitionPenaltyLogitsProcessor(row.repetition_penalty)(
                seen[at : at + 1], logits[at : at + 1]
            )
            for at, row in enumerate(rows)
        ]
    )
    found = logits.clone()
    penalize(found, [(at, row, TokenCounts(seen[at].tolist())) for at, row in enumerate(rows)])
    torch.testing.assert_close(found, expected)
    draws = [Draw(SamplingOptions(min_p=share), 0, 0, (), ()) for share in (0.0, 0.05, 0.5)]
    weights = torch.softmax(logits.double(), dim=-1)
    drop_unlikely(weights, draws)
    for at, draw in enumerate(draws[1:], start=1):
        kept = transformers.MinPLogitsWarper(draw.options.min_p)(seen[:1], logits[at : at + 1].double())
        assert torch.equal(weights[at] > 0, kept[0].isfinite())
    assert (weights[0] > 0).all()


def test_counting_is_the_same_in_pieces_and_stops_at_a_token_that_is_not_known() -> None:
    output = [number * number % 97 for number in range(500)]
    whole, pieces = TokenCounts(prompt(300), output), TokenCounts(prompt(300))
    growing: list[int] = []
    for token in output:
        growing.append(-1)
        pieces.follow(growing)
        growing[-1] = token
        pieces.follow(growing)
    assert dict(zip(whole.ids.tolist(), whole.times.tolist(), strict=True)) == dict(
        zip(pieces.ids.tolist(), pieces.times.tolist(), strict=True)
    )
    assert {token: times for token, times in zip(whole.ids, whole.times, strict=True) if times} == Counter(output)
    assert set(whole.ids.tolist()) == {*prompt(300), *output}


def test_rows_without_such_fields_are_not_touched() -> None:
    logits = torch.randn(2, 32)
    kept = logits.clone()
    choose(logits, [Draw(SamplingOptions(temperature=0), 0, 0, (), ())] * 2)
    assert torch.equal(logits, kept)
