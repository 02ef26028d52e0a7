"""The mock's tokens depend on every byte of its blocks."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import MockSettings, PoolSettings
from pipeline.protocol import SamplingOptions
from workers.engines.mock import MockRunner
from workers.engines.paged.blocks import new_table
from workers.engines.paged.runner import Draw, Row

SETTINGS = MockSettings(
    block_size=4, num_blocks=8, block_nbytes=256, vocab_size=2**31, prefill_base_ms=0, decode_base_ms=0,
    prefill_token_ms=0, decode_seq_ms=0,
)  # fmt: skip
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
GREEDY = Draw(SamplingOptions(temperature=0), choice=0, index=0, banned=(), eos_token_ids=())


async def started() -> MockRunner:
    runner = MockRunner(SETTINGS, PoolSettings(engine="mock"))
    await runner.start()
    return runner


async def exported(tokens: list[int]) -> bytearray:
    """The bytes of the blocks that hold these tokens."""
    runner = await started()
    await runner.run([Row(tokens, 0, new_table([0, 1, 2]), [])])
    data = bytearray(3 * SETTINGS.block_nbytes)
    runner.gather([0, 1, 2], memoryview(data))
    return data


async def next_token(data: bytes | bytearray, draw: Draw = GREEDY, blocks: tuple[int, ...] = (5, 3, 7)) -> int:
    """What follows the prompt when its blocks hold these bytes, in any place."""
    runner = await started()
    runner.scatter(memoryview(data), blocks)
    [token] = await runner.run([Row([99], len(PROMPT), new_table(blocks), [draw])])
    assert isinstance(token, int)
    return token


async def test_the_place_of_blocks_does_not_matter_and_their_order_does() -> None:
    data = await exported(PROMPT)
    size = SETTINGS.block_nbytes
    assert await next_token(data) == await next_token(data, blocks=(0, 1, 2))
    swapped = data[size : 2 * size] + data[:size] + data[2 * size :]
    assert await next_token(data) != await next_token(swapped)


async def test_a_foreign_or_missing_block_changes_the_token() -> None:
    data = await exported(PROMPT)
    size = SETTINGS.block_nbytes
    foreign = await exported([*PROMPT[:4], 0, *PROMPT[5:]])
    assert await next_token(data) != await next_token(data[:size] + foreign[size : 2 * size] + data[2 * size :])
    assert await next_token(data) != await next_token(bytes(size) + data[size:])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(PROMPT) * 64 - 1), st.integers(1, 255))
async def test_any_flipped_byte_of_a_token_changes_the_token(offset: int, flip: int) -> None:
    data = await exported(PROMPT)
    expected = await next_token(data)
    data[offset] ^= flip
    assert await next_token(data) != expected


async def test_seed_choice_and_index_matter_unless_greedy() -> None:
    data = await exported(PROMPT)
    options = SamplingOptions(seed=1)
    draws = [Draw(SamplingOptions(seed=seed), choice, index, (), ()) for seed, choice, index in
             [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (-1, 0, 0)]]  # fmt: skip
    assert len({await next_token(data, draw) for draw in draws}) == len(draws)
    assert await next_token(data, draws[0]) == await next_token(data, Draw(options, 0, 0, (), ()))
    unseeded = Draw(SamplingOptions(), 0, 0, (), ())
    assert await next_token(data, unseeded) != await next_token(data, unseeded)
    assert await next_token(data, Draw(SamplingOptions(temperature=0, seed=9), 0, 5, (), ())) == await next_token(data)


async def test_answers_never_end_by_chance() -> None:
    data = await exported(PROMPT)
    token = await next_token(data)
    assert await next_token(data, Draw(SamplingOptions(temperature=0), 0, 0, (), (token,))) != token
    assert await next_token(data, Draw(SamplingOptions(temperature=0), 0, 0, (token,), ())) != token


async def test_a_whole_prompt_and_its_chunks_leave_the_same_bytes() -> None:
    runner = await started()
    cut = random.Random(0).randrange(1, len(PROMPT))
    table = new_table([4, 5, 6])
    await runner.run([Row(PROMPT[:cut], 0, table, [])])
    await runner.run([Row(PROMPT[cut:], cut, table, [])])
    data = bytearray(3 * SETTINGS.block_nbytes)
    runner.gather(table, memoryview(data))
    assert data == await exported(PROMPT)
