"""One suite for every engine of blocks: what `workers.engine.AsyncEngine` promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import KVLost, Unservable
from pipeline.protocol import BackendInput, FinishReason, GuidedDecoding, KVHandle, Log, RoutingHints
from tests.contract.engines import (
    BLOCK,
    VOCABULARY,
    Engines,
    prompt,
    request_of,
    require_cuda,
    stopping,
    with_output,
    write_model,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["mock", "torch", pytest.param("torch-cuda", marks=pytest.mark.gpu)])
def engines(request: pytest.FixtureRequest, model_dir: Path, short_dir: Path) -> Iterator[Engines]:
    if request.param == "torch-cuda":
        require_cuda()
    yield Engines(request.param, str(model_dir), short_dir)
    assert not list(short_dir.iterdir()), "shared memory was left behind"


def mixed(prefix: str = "r") -> list[BackendInput]:
    """Greedy and seeded, one choice and three, prompts on and beside the edges of blocks."""
    lengths = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 90]
    return [
        request_of(f"{prefix}{number}", prompt(length, number), n=n, temperature=temperature, seed=number, top_p=top_p)
        for number, (length, n, temperature, top_p) in enumerate(
            zip(lengths, [1, 3, 1, 3, 3, 1], [0, 0, 1, 1, 0.8, 1], [1, 1, 1, 1, 0.9, 0.9], strict=True)
        )
    ]


async def test_alone_in_a_batch_and_over_a_transfer_the_tokens_are_the_same(engines: Engines) -> None:
    async with engines.engine() as one, engines.engine() as prefill, engines.engine() as decode:
        together = await one.generate(*mixed())
        for request, expected in zip(mixed("alone"), together, strict=True):
            assert await one.generate(request) == [expected]
        pair = await asyncio.gather(*(decode.take_over(prefill, request) for request in mixed()))
        assert list(pair) == together
        assert decode.engine.stats().prompt_tokens_computed == 0
        assert prefill.engine.stats().handles_exported == 0
        assert [running.engine.stats().blocks_used for running in (one, prefill, decode)] == [0, 0, 0]


async def test_choices_of_a_seeded_request_differ_and_an_unseeded_one_differs_each_time(engines: Engines) -> None:
    async with engines.engine() as one:
        [seeded] = await one.generate(request_of("a", prompt(20), n=3, temperature=1, seed=5))
        assert len({tuple(tokens) for tokens in seeded}) == 3
        [[first], [second]] = await one.generate(*(request_of(name, prompt(20), temperature=1) for name in "bc"))
        assert first != second


async def test_a_request_that_arrives_during_a_run_joins_the_next_step(engines: Engines) -> None:
    async with engines.engine() as one:
        early, late = request_of("early", prompt(40), 200), request_of("late", prompt(40, 1), 5)
        await one.engine.decode(early, None, Log.empty(1))
        await one.until(lambda: len(one.tokens.get(("early", 0), [])) >= 3)
        steps_before = one.engine.stats().steps
        await one.engine.decode(late, None, Log.empty(1))
        await one.finished(late)
        joined = next(step for step in one.engine.step_log() if any(row[0] == "late" for row in step.rows))
        assert joined.step <= steps_before + 1
        assert ("early", 0) in {row[:2] for row in joined.rows}


async def test_while_a_long_prompt_is_computed_every_running_sequence_gets_a_token_in_each_step(
    engines: Engines,
) -> None:
    async with engines.engine() as one:
        short = [request_of(f"short{number}", prompt(30, number), 400) for number in range(3)]
        for request in short:
            await one.engine.decode(request, None, Log.empty(1))
        await one.until(lambda: len(one.tokens) == 3)
        await one.engine.decode(request_of("long", prompt(1500, 9), 2), None, Log.empty(1))
        await one.until(lambda: ("long", 0) in one.ends)
        chunks = [step.rows for step in one.engine.step_log() if any(r[0] == "long" and r[3] > 1 for r in step.rows)]
        assert len(chunks) >= 3
        for rows in chunks:
            assert [(r[0], r[3]) for r in rows if r[0] != "long"] == [(request.request_id, 1) for request in short]
        assert sum(row[3] for rows in chunks for row in rows if row[0] == "long") == 1500
        for request in short:
            await one.engine.cancel(request.request_id)


async def test_a_shared_prefix_is_computed_once(engines: Engines) -> None:
    async with engines.engine() as one, engines.engine() as fresh:
        shared = prompt(1000, 3)
        first, second = request_of("a", shared + prompt(20, 1)), request_of("b", shared + prompt(30, 2))
        [expected] = await fresh.generate(second)
        assert (await one.engine.prefill(first, Log.empty(1))).cached_tokens == 0
        computed = one.engine.stats().prompt_tokens_computed
        assert await one.engine.decode(second, None, Log.empty(1)) == 1000 // BLOCK * BLOCK
        assert await one.finished(second) == expected
        assert one.engine.stats().prompt_tokens_computed - computed == 1030 - 1000 // BLOCK * BLOCK


async def test_a_prompt_that_is_wholly_cached_computes_its_last_block_only(engines: Engines) -> None:
    async with engines.engine() as one:
        [first] = await one.generate(request_of("a", prompt(4 * BLOCK)))
        prefilled = await one.engine.prefill(request_of("b", prompt(4 * BLOCK)), Log.empty(1))
        assert prefilled.cached_tokens == 3 * BLOCK
        assert prefilled.outputs[0].token_ids == first[0][:1]
        salted = msgspec.structs.replace(request_of("c", prompt(4 * BLOCK)), routing=RoutingHints(cache_salt="other"))
        assert (await one.engine.prefill(salted, Log.empty(1))).cached_tokens == 0


async def test_equal_prefixes_that_arrive_by_handle_share_memory(engines: Engines) -> None:
    async with engines.engine() as prefill, engines.engine() as decode:
        requests = [request_of(f"r{number}", prompt(10 * BLOCK + 3), 300) for number in range(3)]
        for request in requests:
            prefilled = await prefill.engine.prefill(request, Log.empty(1))
            await decode.engine.decode(request, prefilled.kv, Log(tokens=[[5]], finished=[None]))
        assert decode.engine.stats().blocks_used < 3 * 11
        for request in requests:
            await decode.engine.cancel(request.request_id)


async def test_a_pool_too_small_for_all_preempts_and_gives_the_same_tokens(engines: Engines) -> None:
    requests = [request_of(f"r{number}", prompt(60, number), 50, n=1 + number % 2) for number in range(6)]
    async with engines.engine(prefix_cache=False) as large, engines.engine(num_blocks=16, prefix_cache=False) as small:
        expected = await large.generate(*requests)
        await asyncio.gather(*(small.engine.decode(r, None, Log.empty(r.sampling_options.n)) for r in requests))
        assert [await small.finished(request) for request in requests] == expected
        stats = small.engine.stats()
        assert stats.preemptions > 0
        assert stats.recomputed_tokens > 0
        assert stats.prompt_tokens_computed == 6 * 60
        assert max(step.blocks_used for step in small.engine.step_log()) <= 16
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)


async def test_a_log_is_gone_on_with_and_never_sampled_again(engines: Engines) -> None:
    request = request_of("r", prompt(50), 20, n=3, temperature=1, seed=3)
    async with engines.engine() as whole, engines.engine() as resumed:
        [expected] = await whole.generate(request)
        log = Log(tokens=[expected[0][:7], expected[1][:1], []], finished=[None, None, None])
        await resumed.engine.decode(request, None, log)
        rest = await resumed.finished(request)
        assert [before + after for before, after in zip(log.tokens, rest, strict=True)] == expected


async def test_finished_choices_are_left_out_and_complete_logs_end(engines: Engines) -> None:
    request = request_of("r", prompt(20), 4, n=3)
    async with engines.engine() as one:
        log = Log(tokens=[[1], [1, 2, 3, 4], [1, 2]], finished=[FinishReason.STOP, None, None])
        await one.engine.decode(request, None, log)
        await one.until(lambda: len(one.ends) == 2)
        assert {key[1]: (reason, len(one.tokens[key])) for key, reason in one.ends.items()} == {
            1: (FinishReason.LENGTH, 0),
            2: (FinishReason.LENGTH, 2),
        }


async def test_cancelling_frees_blocks_and_silences_the_request(engines: Engines) -> None:
    async with engines.engine() as one:
        requests = [request_of(f"r{number}", prompt(60, number), 1000) for number in range(3)]
        for request in requests:
            await one.engine.decode(request, None, Log.empty(1))
        await one.until(lambda: len(one.tokens) == 3)
        await one.engine.cancel("r0")
        seen = len(one.tokens["r0", 0])
        await one.engine.cancel("unknown")
        one.tokens["r1", 0].clear()
        await one.until(lambda: len(one.tokens["r1", 0]) > 5)
        assert len(one.tokens["r0", 0]) == seen
        await one.engine.cancel("r1")
        await one.engine.cancel("r2")
        [last] = await one.generate(request_of("again", prompt(60, 0), 5))
        assert len(last[0]) == 5
        assert one.engine.stats().blocks_used == 0


async def test_cancelling_what_waits_or_is_prefilled_ends_its_call(engines: Engines) -> None:
    async with engines.engine(num_blocks=8) as one:
        running = request_of("running", prompt(90), 20)
        await one.engine.decode(running, None, Log.empty(1))
        calls = [
            asyncio.create_task(one.engine.decode(request_of("waiting", prompt(90, 1)), None, Log.empty(1))),
            asyncio.create_task(one.engine.prefill(request_of("prefill", prompt(90, 2)), Log.empty(1))),
        ]
        await asyncio.sleep(0)
        await one.engine.cancel("waiting")
        await one.engine.cancel("prefill")
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        await one.finished(running)
        assert one.engine.stats().waiting == 0


async def test_one_choice_is_cancelled_and_the_others_go_on(engines: Engines) -> None:
    request = request_of("r", prompt(700), 20, n=3, temperature=1, seed=1)
    async with engines.engine() as whole, engines.engine() as one:
        [expected] = await whole.generate(request)
        await one.engine.decode(request, None, Log.empty(3))
        await one.engine.cancel("r", 0)  # it leads: its prompt goes on with the next choice
        await one.until(lambda: {("r", 1), ("r", 2)} <= one.ends.keys())
        assert [one.tokens["r", choice] for choice in (1, 2)] == expected[1:]
        assert ("r", 0) not in one.ends


async def test_a_choice_ends_by_eos_by_stop_token_or_by_length(engines: Engines) -> None:
    request = request_of("r", prompt(30), 12, temperature=1, seed=1)
    async with engines.engine() as one:
        [[free]] = await one.generate(request)
        third = free[2]
        index = free.index(third)
        stopped = stopping(msgspec.structs.replace(request, request_id="s"), stop_token_ids=[third])
        assert await one.generate(stopped) == [[free[: index + 1]]]
        assert one.ends["s", 0] is FinishReason.STOP
        late = stopping(msgspec.structs.replace(stopped, request_id="late"), min_tokens=8)
        [[tokens]] = await one.generate(late)
        assert third not in tokens[:8]
        assert len(tokens) >= 8
        assert (one.ends["r", 0], len(free)) == (FinishReason.LENGTH, 12)


async def test_the_context_ends_a_choice(engines: Engines) -> None:
    async with engines.engine(num_blocks=4) as one:
        assert one.engine.info.max_model_len == 4 * BLOCK
        [[tokens]] = await one.generate(request_of("r", prompt(50), 1000))
        assert (len(tokens), one.ends["r", 0]) == (4 * BLOCK - 50, FinishReason.LENGTH)


async def test_a_first_token_that_ends_the_request_exports_nothing(engines: Engines) -> None:
    async with engines.engine() as one:
        prefilled = await one.engine.prefill(request_of("r", prompt(40), 1, n=2), Log.empty(2))
        assert prefilled.kv is None
        assert [output.finish_reason for output in prefilled.outputs] == [FinishReason.LENGTH] * 2
        assert one.engine.stats().handles_exported == 0
        assert one.engine.stats().blocks_used == 0


async def test_what_can_never_be_served_is_refused_with_its_reason(engines: Engines) -> None:
    async with engines.engine(num_blocks=8) as one:
        plain = request_of("r", prompt(10))
        refused = {
            "leaves no room": request_of("r", prompt(8 * BLOCK)),
            "the prompt is empty": request_of("r", []),
            "n = 65": request_of("r", prompt(10), n=65),
            "routing.lora_name": msgspec.structs.replace(plain, routing=RoutingHints(lora_name="other")),
        }
        if engines.kind == "mock":
            refused |= {
                "output_options.logprobs": with_output(plain, logprobs=1),
                "output_options.prompt_logprobs": with_output(plain, prompt_logprobs=1),
                "sampling_options.guided_decoding": request_of("r", [1], guided_decoding=GuidedDecoding(regex="a")),
                "sampling_options.frequency_penalty": request_of("r", prompt(10), frequency_penalty=0.5),
                "sampling_options.logit_bias": request_of("r", prompt(10), logit_bias={"1": 1.0}),
                "sampling_options.min_p": request_of("r", prompt(10), min_p=0.5),
            }
        for reason, request in refused.items():
            with pytest.raises(Unservable, match=reason):
                await one.engine.decode(request, None, Log.empty(request.sampling_options.n))
        assert len((await one.generate(plain))[0][0]) == 12


async def test_a_handle_of_another_layout_or_length_is_lost_kv(engines: Engines) -> None:
    async with engines.engine() as prefill, engines.engine() as decode, engines.engine(block_size=32) as other:
        request = request_of("r", prompt(40))
        kv = (await prefill.engine.prefill(request, Log.empty(1))).kv
        assert isinstance(kv, KVHandle)
        log = Log(tokens=[[3]], finished=[None])
        wrong = [
            (other, kv),
            (decode, msgspec.structs.replace(kv, layout="another")),
            (decode, msgspec.structs.replace(kv, num_tokens=41)),
            (decode, msgspec.structs.replace(kv, num_blocks=9)),
        ]
        for engine, handle in wrong:
            with pytest.raises(KVLost) as lost:
                await engine.engine.decode(request, handle, log)
            assert lost.value.reason == "layout"
        await prefill.engine.release(kv.id)
        with pytest.raises(KVLost):
            await decode.engine.decode(request, kv, log)
        assert decode.engine.stats().blocks_used == 0
        await decode.engine.decode(request, None, log)  # and the caller may go on without it
        assert len((await decode.finished(request))[0]) == 11


async def test_tokens_are_in_the_vocabulary(engines: Engines) -> None:
    async with engines.engine() as one:
        [tokens] = await one.generate(request_of("r", prompt(10), 100, temperature=1.5, seed=2))
        assert set(tokens[0]) <= set(range(VOCABULARY))
