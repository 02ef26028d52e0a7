"""What `AsyncEngine` promises, of vLLM in a process of its own: hand-over, resumption, cancellation, lost blocks, stop conditions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pipeline.errors import KVLost, Unservable
from pipeline.protocol import BackendInput, FinishReason, KVHandle, Log
from tests.contract.engines import request_of, stopping
from tests.with_vllm.pairs import BLOCK, Pair, fresh, pair_at, prompt
from tests.with_vllm.settings import requires_vllm

pytestmark = [pytest.mark.vllm, requires_vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with pair_at(tmp_path_factory.mktemp("blocks")) as both:
        yield both


SAMPLED = {"temperature": 1.0, "seed": 11}
KINDS = {
    "greedy": {},
    "seeded": SAMPLED,
    "seeded, cut": SAMPLED | {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.1},
    "seeded, penalties": SAMPLED | {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_log_is_gone_on_with_as_if_nothing_had_happened(pair: Pair, kind: str) -> None:
    asked = request_of(f"whole {kind}", prompt(70), 40, **KINDS[kind])
    [[whole]] = await pair.prefill.generate(asked)
    assert len(whole) == 40
    for count in (1, 2, 17, 39):
        again = msgspec.structs.replace(asked, request_id=f"{kind} {count}")
        await pair.decode.engine.decode(again, None, Log(tokens=[whole[:count]], finished=[None]))
        assert (await pair.decode.finished(again))[0] == whole[count:], count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 200, 600])
async def test_handed_over_the_tokens_are_the_same(pair: Pair, kind: str, length: int) -> None:
    asked = request_of(f"here {kind} {length}", prompt(length, length), 12, n=3, **KINDS[kind])
    [here] = await pair.prefill.generate(asked)
    before = (await fresh(pair.decode)).prompt_tokens_computed
    over = await pair.decode.take_over(pair.prefill, msgspec.structs.replace(asked, request_id=f"over {kind} {length}"))
    assert over == here
    await pair.rests()
    assert pair.decode.engine.stats().prompt_tokens_computed == before


async def test_a_repetition_penalty_is_the_same_whoever_applies_it(pair: Pair) -> None:
    """vLLM to greedy requests; our processor to seeded ones, of which these may only take the best token."""
    only_best = SAMPLED | {"top_k": 1}
    answers = {}
    for name, options in [("greedy", {}), ("seeded", only_best)]:
        for penalty in (1.0, 1.6):
            asked = request_of(f"{name} {penalty}", prompt(70), 40, **options, repetition_penalty=penalty)
            answers[name, penalty] = await pair.prefill.generate(asked)
    assert answers["seeded", 1.6] == answers["greedy", 1.6] != answers["greedy", 1.0] == answers["seeded", 1.0]


async def test_choices_that_have_ended_are_left_out(pair: Pair) -> None:
    asked = request_of("three", prompt(50), 10, n=3, **SAMPLED)
    [whole] = await pair.prefill.generate(asked)
    again = msgspec.structs.replace(asked, request_id="two")
    log = Log(tokens=[whole[0][:4], whole[1], whole[2][:7]], finished=[None, FinishReason.LENGTH, None])
    await pair.decode.engine.decode(again, None, log)
    await pair.decode.until(lambda: ("two", 0) in pair.decode.ends and ("two", 2) in pair.decode.ends)
    assert [pair.decode.tokens.get(("two", choice), []) for choice in range(3)] == [whole[0][4:], [], whole[2][7:]]


async def test_a_log_that_is_complete_but_not_said_so_ends_without_a_step(pair: Pair) -> None:
    asked = request_of("complete", prompt(20), 5)
    [[whole]] = await pair.prefill.generate(asked)
    again = msgspec.structs.replace(asked, request_id="complete again")
    await pair.decode.engine.decode(again, None, Log(tokens=[whole], finished=[None]))
    assert await pair.decode.finished(again) == [[]]
    assert pair.decode.ends["complete again", 0] is FinishReason.LENGTH


async def exported(pair: Pair, name: str, length: int = 70) -> tuple[BackendInput, KVHandle, Log]:
    asked = request_of(name, prompt(length, sum(map(ord, name))), 10)
    prefilled = await pair.prefill.engine.prefill(asked, Log.empty(1))
    assert prefilled.kv is not None
    return asked, prefilled.kv, Log(tokens=[list(prefilled.outputs[0].token_ids)], finished=[None])


@pytest.mark.parametrize("loss", ["released", "other layout", "fewer blocks", "another digest"])
async def test_lost_blocks_are_said_and_never_used(pair: Pair, loss: str) -> None:
    asked, kv, log = await exported(pair, f"lost {loss}")
    changed = {
        "released": kv,
        "other layout": msgspec.structs.replace(kv, layout="vllm-other"),
        "fewer blocks": msgspec.structs.replace(kv, num_blocks=1),
        "another digest": msgspec.structs.replace(kv, digest="0" * 32),
    }[loss]
    if loss == "released":
        await pair.prefill.engine.release(kv.id)
    with pytest.raises(KVLost) as error:
        cached = await pair.decode.engine.decode(asked, changed, log)
        pytest.fail(f"{cached} tokens of {changed} were used after {log}: {pair.decode.engine.stats()}")
    assert error.value.reason == {"released": "generation", "another digest": "digest"}.get(loss, "layout")
    await pair.prefill.engine.release(kv.id)
    await pair.rests()
    assert await pair.decode.engine.decode(asked, None, log) == 0  # nothing of it is in the prefix cache
    [tokens] = await pair.decode.finished(asked)
    [[whole]] = await pair.prefill.generate(msgspec.structs.replace(asked, request_id=f"right {loss}"))
    assert log.tokens[0] + tokens == whole


async def test_what_is_cancelled_gives_back_its_blocks(pair: Pair) -> None:
    decode = pair.decode.engine
    running = [
        request_of(f"cancelled {number}", prompt(100, number), 1000, n=2) for number in range(12)
    ]  # 24 of 16 places
    joining = [asyncio.create_task(decode.decode(item, None, Log.empty(2))) for item in running]
    await pair.decode.until(lambda: len(pair.decode.tokens.get(("cancelled 0", 1), [])) > 3)
    for item in running:
        await decode.cancel(item.request_id)
    for outcome in await asyncio.gather(*joining, return_exceptions=True):
        assert isinstance(outcome, int | asyncio.CancelledError) or "cancelled" in str(outcome).lower()
    await pair.rests()


async def test_one_choice_is_cancelled_and_the_other_goes_on(pair: Pair) -> None:
    asked = request_of("one of two", prompt(40), 60, n=2)
    await pair.decode.engine.decode(asked, None, Log.empty(2))
    await pair.decode.until(lambda: len(pair.decode.tokens.get(("one of two", 1), [])) > 3)
    await pair.decode.engine.cancel("one of two", 1)
    await pair.decode.until(lambda: ("one of two", 0) in pair.decode.ends)
    assert len(pair.decode.tokens["one of two", 0]) == 60
    assert len(pair.decode.tokens["one of two", 1]) < 60
    await pair.rests()


async def test_an_export_waits_for_room_and_one_that_is_given_up_leaves(pair: Pair) -> None:
    prefill = pair.prefill.engine
    _, first, _ = await exported(pair, "first", 20 * BLOCK)
    waiting = {name: asyncio.create_task(exported(pair, name, 10 * BLOCK)) for name in ("given up", "second")}
    done, _ = await asyncio.wait(waiting.values(), timeout=2)
    assert not done
    waiting["given up"].cancel()
    await asyncio.wait([waiting["given up"]])
    assert waiting["given up"].cancelled()
    await prefill.release(first.id)
    _, second, _ = await waiting["second"]
    await prefill.release(second.id)
    await pair.rests()


async def test_a_prefill_that_is_given_up_at_any_moment_leaves_no_handle(pair: Pair) -> None:
    """Also in the moment in which the blocks are published and the other choices are still computed."""
    for number in range(60):
        asked = request_of(f"any moment {number}", prompt(40, 500 + number), 10, n=8, temperature=1.0, seed=number)
        prefilling = asyncio.create_task(pair.prefill.engine.prefill(asked, Log.empty(8)))
        await asyncio.wait([prefilling], timeout=0.001 * (number % 30))
        prefilling.cancel()
        await asyncio.wait([prefilling])
        if not prefilling.cancelled():
            kv = prefilling.result().kv
            assert kv is not None
            await pair.prefill.engine.release(kv.id)
    await pair.rests()


async def test_a_fetch_that_is_given_up_at_any_moment_leaves_no_blocks(pair: Pair) -> None:
    for number in range(40):
        asked, kv, log = await exported(pair, f"fetched {number}", 70 + number)
        fetching = asyncio.create_task(pair.decode.engine.decode(asked, kv, log))
        await asyncio.wait([fetching], timeout=0.0005 * (number % 20))
        fetching.cancel()
        await asyncio.wait([fetching])
        await pair.decode.engine.cancel(asked.request_id)
        await pair.prefill.engine.release(kv.id)
    await pair.rests()


async def test_it_ends_where_the_request_says(pair: Pair) -> None:
    asked = request_of("free", prompt(60), 30)
    [[free]] = await pair.prefill.generate(asked)
    third = free[2]
    at = free.index(third) + 1
    for name, stop, expected, reason in [
        ("eos", {}, at, FinishReason.EOS),
        ("stop", {"stop_token_ids": [third]}, at, FinishReason.STOP),
        ("ignored", {"ignore_eos": True}, 30, FinishReason.LENGTH),
    ]:
        request = stopping(msgspec.structs.replace(asked, request_id=name), **stop)
        if name != "stop":
            request = msgspec.structs.replace(request, eos_token_ids=[third])
        over = await pair.decode.take_over(pair.prefill, request)
        assert over == [free[:expected]], name
        assert pair.decode.ends.get((name, 0), reason) is reason
    later = msgspec.structs.replace(stopping(asked, min_tokens=12), request_id="late", eos_token_ids=[third])
    [[late]] = await pair.prefill.generate(later)
    assert len(late) >= 12
    over = await pair.decode.take_over(pair.prefill, msgspec.structs.replace(later, request_id="late, handed over"))
    assert over == [late]
    [[cut]] = await pair.prefill.generate(
        msgspec.structs.replace(stopping(asked, min_tokens=12, max_tokens=5), request_id="late and cut")
    )
    assert cut == free[:5]
    single = await pair.prefill.engine.prefill(
        stopping(msgspec.structs.replace(asked, request_id="1"), max_tokens=1), Log.empty(1)
    )
    assert single.kv is None
    assert single.outputs[0].finish_reason is FinishReason.LENGTH
    await pair.rests()


async def test_what_cannot_be_served_is_refused_by_name(pair: Pair) -> None:
    engine = pair.decode.engine
    good = request_of("refused", prompt(10))
    for request, word in [
        (msgspec.structs.replace(good, token_ids=[]), "empty"),
        (msgspec.structs.replace(good, token_ids=prompt(2048)), "no room"),
        (msgspec.structs.replace(good, token_ids=[1_000_000]), "1000000"),
        (msgspec.structs.replace(good, token_ids=[5, -7, 6]), "-7"),
        (stopping(good, stop_token_ids=[-1], min_tokens=3), "-1"),
        (request_of("refused", prompt(10), top_p=7.0), "top_p"),
        (request_of("refused", prompt(10), logit_bias={"a": 1.0}), "logit_bias"),
    ]:
        with pytest.raises(Unservable, match=word):
            await engine.decode(request, None, Log.empty(1))
    beyond = msgspec.structs.replace(stopping(good, min_tokens=3), request_id="beyond", eos_token_ids=[1_000_000])
    for request in (good, beyond):  # some models name an end that they cannot say
        await engine.decode(request, None, Log.empty(1))
        [tokens] = await pair.decode.finished(request)
        assert len(tokens) == 12
