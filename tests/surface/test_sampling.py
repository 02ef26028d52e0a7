"""Answers do not depend on company: alone or in a batch, with a client or without one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from pipeline.client import PoolClient
from pipeline.protocol import FinishReason, Request
from pipeline.queue import ENDED_STATES, Standing
from pipeline.tokenizer import Conversation, Tokenizer
from tests.system import POOL, System, collect, request

TORCH = f"pools.{POOL}.engine=torch"
QUESTIONS = ("What is Baton?", "Tell me a story about a fox.", "What is a block handle?", "Hello!", "What is 7 + 5?")


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    text = tokenizer.render(Conversation(messages=[{"role": "user", "content": question}]))
    return tokenizer.encode(text, add_special_tokens=False)


async def answer(client: PoolClient, item: Request) -> list[list[int]]:
    tokens, ended = await collect(await client.submit(again(item)), item.input.sampling_options.n)
    assert ended.state == "done", ended
    return tokens


def again(item: Request) -> Request:
    """The same request under a new id."""
    fresh = request(1).id
    return msgspec.structs.replace(item, id=fresh, input=msgspec.structs.replace(item.input, request_id=fresh))


async def test_greedy_and_seeded_answers_are_the_same_alone_and_in_a_batch(
    default_redis_url: str, tmp_path: Path
) -> None:
    async with System(default_redis_url, TORCH, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        tokenizer = Tokenizer.load(POOL)
        items = [
            request(prompt(tokenizer, question), n=n, max_tokens=24, temperature=temperature, seed=seed)
            for question in QUESTIONS
            for n in (1, 3)
            for temperature, seed in ((0.0, None), (1.0, 5))
        ]
        async with system.client() as client:
            alone = [await answer(client, item) for item in items]
            together = await asyncio.gather(*(answer(client, item) for item in items))
            assert together == alone
            seeded = [tokens for item, tokens in zip(items, alone, strict=True) if item.input.sampling_options.seed]
            assert any(len({tuple(choice) for choice in tokens}) > 1 for tokens in seeded), "choices draw apart"


async def test_stop_strings_cut_the_same_with_and_without_a_client(default_redis_url: str, tmp_path: Path) -> None:
    async with System(default_redis_url, TORCH, log_dir=tmp_path) as system:
        await system.worker("prefill")
        await system.worker("decode")
        tokenizer = Tokenizer.load(POOL)
        stops = [["Redis"], ["queues."], ["B"], [" workers", "zzz"], ["never said"]]
        items = [
            request(prompt(tokenizer, "What is Baton?"), n=2, max_tokens=60, stop=stop, eos=tokenizer.eos_token_ids)
            for stop in stops
        ]
        async with system.client() as client:
            attended = []
            for item in items:
                watched = again(item)
                await collect(await client.submit(watched), 2)
                attended.append(await ended(system, client, watched.id))
            alone = []
            for item in items:
                unwatched = again(item)
                async with await client.submit(unwatched):
                    pass  # nobody reads
                alone.append(await ended(system, client, unwatched.id))
        for left, right, stop in zip(attended, alone, stops, strict=True):
            assert (left.log, left.completion_tokens, left.state) == (right.log, right.completion_tokens, "done")
            expected = FinishReason.EOS if stop == ["never said"] else FinishReason.STOP
            assert left.log.finished == [expected, expected]
            for tokens in left.log.tokens:
                text = tokenizer.decode(tokens)
                before = tokenizer.decode(tokens[:-1])
                assert stop == ["never said"] or (any(s in text for s in stop) and not any(s in before for s in stop))


async def ended(system: System, client: PoolClient, request_id: str) -> Standing:
    found: list[Standing] = []

    async def is_over() -> bool:
        standing = await client.queue.attach(request_id, watch=False)
        assert standing is not None
        found[:] = [standing]
        return standing.state in ENDED_STATES

    await system.until(is_over, 30)
    return found[0]
