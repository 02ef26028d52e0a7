"""A reader gets each (choice, index) once and in order, whatever the bus loses, repeats or reorders."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RedisUnavailable
from pipeline.protocol import EndItem, FinishReason, Log, Timeline, TokenItem, pack_tokens
from pipeline.queue import Standing
from pipeline.stream import PART_TOKENS, RequestStream, TokenChunk
from tests.system import request, take

LOGS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
END = EndItem("r", "done", "", 4, 9, 0, "decode", Timeline())


class Store:
    """What Redis would answer: the log as far as it is written."""

    def __init__(self) -> None:
        self.written = [0, 0]
        self.ended = False
        self.reads = 0
        self.cancelled: list[str] = []
        self.lingers: list[float] = []

    async def read(self, request_id: str) -> Standing:
        self.reads += 1
        await asyncio.sleep(0)
        finished = [
            FinishReason.LENGTH if count == len(log) else None for count, log in zip(self.written, LOGS, strict=True)
        ]
        tokens = [log[:count] for log, count in zip(LOGS, self.written, strict=True)]
        return Standing(
            "done" if self.ended else "running",
            "",
            "decode",
            4,
            9,
            0,
            Timeline(),
            Log(tokens=tokens, finished=finished),
        )

    async def cancel(self, request_id: str, reason: str) -> None:
        self.cancelled.append(reason)

    async def linger(self, request_id: str, seconds: float) -> None:
        self.lingers.append(seconds)

    async def forget(self, stream: RequestStream) -> None: ...


def open_stream(store: Store, buffer_items: int = 100, **known: Any) -> RequestStream:
    return RequestStream(
        "r", 2, buffer_items=buffer_items, patience_s=5, read=store.read, cancel=store.cancel, forget=store.forget,
        linger=store.linger, **known,
    )  # fmt: skip


def item(choice: int, start: int, stop: int) -> TokenItem:
    log = LOGS[choice]
    return TokenItem("r", choice, start, pack_tokens(log[start:stop]), "length" if stop == len(log) else "")


async def read_all(stream: RequestStream) -> tuple[list[list[int]], list[TokenChunk]]:
    tokens: list[list[int]] = [[], []]
    seen: list[TokenChunk] = []
    async with asyncio.timeout(5):
        async for chunks in stream:
            for chunk in chunks:
                take(tokens, chunk)
                seen.append(chunk)
    return tokens, seen


@given(st.randoms(use_true_random=False), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_loss_repetition_and_disorder_never_show(rng: random.Random, buffer_items: int) -> None:
    asyncio.run(deliver_badly(rng, buffer_items))


async def deliver_badly(rng: random.Random, buffer_items: int) -> None:
    store = Store()
    stream = open_stream(store, buffer_items)
    reading = asyncio.create_task(read_all(stream))
    frames: list[TokenItem] = []
    while store.written != [len(log) for log in LOGS]:
        choice = rng.choice([c for c in (0, 1) if store.written[c] < len(LOGS[c])])
        start = store.written[choice]
        store.written[choice] = min(len(LOGS[choice]), start + rng.randint(1, 3))
        frames.append(item(choice, start, store.written[choice]))
        for frame in rng.sample(frames, rng.randint(0, min(3, len(frames)))):  # old ones, some never
            stream.feed(frame)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            stream.fall_behind()
    store.ended = True
    if rng.random() < 0.7:
        stream.feed_end(END)
    else:
        stream.fall_behind()  # the end was lost: the silence check sends the reader to the log
    tokens, seen = await reading
    assert tokens == LOGS
    assert [chunk.finish_reason for chunk in seen if chunk.finish_reason] == [FinishReason.LENGTH] * 2
    assert stream.ended is not None
    assert stream.ended.state == "done"


async def test_a_live_stream_never_asks_redis() -> None:
    store = Store()
    stream = open_stream(store)
    for choice, log in enumerate(LOGS):
        for index in range(len(log)):
            stream.feed(item(choice, index, index + 1))
    stream.feed_end(END)
    assert (await read_all(stream))[0] == LOGS
    assert store.reads == 0


async def test_a_slow_reader_costs_a_bounded_buffer_and_goes_on_from_the_log() -> None:
    store = Store()
    store.written = [6, 3]
    stream = open_stream(store, buffer_items=2)
    for index in range(6):
        stream.feed(item(0, index, index + 1))
    assert len(stream._buffer) == 2
    store.ended = True
    assert (await read_all(stream))[0] == LOGS
    assert store.reads == 1


async def test_a_request_that_redis_does_not_know_ends_as_failed() -> None:
    store = Store()
    stream = open_stream(store)

    async def nothing(request_id: str) -> None:
        return None

    stream._read = nothing
    stream.fall_behind()
    assert (await read_all(stream))[0] == [[], []]
    assert stream.ended is not None
    assert stream.ended.state == "failed"


async def test_an_end_that_comes_while_redis_does_not_answer_ends_nothing_early() -> None:
    """What the reader missed before it is still to be read."""
    store = Store()
    store.written, store.ended = [6, 3], True
    is_away = True

    async def read(request_id: str) -> Standing:
        nonlocal is_away
        if is_away:
            is_away = False
            stream.feed_end(END)
            raise RedisUnavailable("away")
        return await store.read(request_id)

    stream = RequestStream(
        "r", 2, buffer_items=100, patience_s=5, read=read, cancel=store.cancel, forget=store.forget, linger=store.linger
    )  # fmt: skip
    stream.fall_behind()
    tokens, _ = await read_all(stream)
    assert tokens == LOGS


async def test_a_log_that_says_otherwise_ends_the_stream_instead_of_being_spliced() -> None:
    store = Store()
    stream = open_stream(store)
    stream.feed(
        TokenItem("r", 0, 0, pack_tokens([5, 6, 99]))
    )  # then Redis lost the third token, and 7 stands there now
    store.written = [5, 0]
    stream.fall_behind()
    tokens, _ = await read_all(stream)
    assert tokens[0] == [5, 6, 99]
    assert stream.ended is not None
    assert (stream.ended.state, stream.ended.reason.split(":")[0]) == ("failed", "stream_diverged")


async def test_a_live_token_that_says_otherwise_ends_the_stream() -> None:
    stream = open_stream(Store())
    stream.feed(TokenItem("r", 0, 0, pack_tokens([5, 6, 99])))
    stream.feed(TokenItem("r", 0, 2, pack_tokens([7, 8])))
    tokens, _ = await read_all(stream)
    assert tokens[0] == [5, 6, 99]
    assert stream.ended is not None
    assert stream.ended.reason.startswith("stream_diverged")


async def test_a_shorter_log_with_the_same_beginning_is_waited_for() -> None:
    store = Store()
    stream = open_stream(store)
    stream.feed(item(0, 0, 4))
    store.written = [2, 0]
    stream.fall_behind()
    reading = asyncio.create_task(read_all(stream))
    await asyncio.sleep(0)
    store.written, store.ended = [6, 3], True
    stream.fall_behind()
    assert (await reading)[0] == LOGS


async def test_a_lost_finish_reason_is_read_from_the_log() -> None:
    store = Store()
    store.written, store.ended = [6, 3], True
    stream = open_stream(store)
    for choice, log in enumerate(LOGS):
        stream.feed(TokenItem("r", choice, 0, pack_tokens(log)))  # the frame with the reason and no token never comes
    stream.feed_end(END)
    tokens, seen = await read_all(stream)
    assert tokens == LOGS
    assert [chunk.finish_reason for chunk in seen if chunk.finish_reason] == [FinishReason.LENGTH] * 2


@pytest.mark.parametrize("reason", ["", "length"])
async def test_a_finish_without_tokens_is_given_once(reason: str) -> None:
    stream = open_stream(Store())
    for _ in range(3):
        stream.feed(TokenItem("r", 1, 0, b"", reason))
    stream.feed_end(EndItem("r", "failed", "", 4, 0, 0, "decode", Timeline()))
    _, seen = await read_all(stream)
    assert len(seen) == (1 if reason else 0)


@pytest.mark.parametrize("start", [(0, 0), (2, 0), (6, 1)])
async def test_a_reader_goes_on_behind_what_it_has(start: tuple[int, int]) -> None:
    store = Store()
    store.written = [6, 1]
    stream = open_stream(store)
    stream.begin(await store.read("r"), start)
    stream.feed(item(1, 1, 3))
    stream.feed_end(END)
    tokens = [log[:count] for log, count in zip(LOGS, start, strict=True)]
    reasons = []
    async with asyncio.timeout(5):
        async for chunks in stream:
            for chunk in chunks:
                take(tokens, chunk)
                reasons.append(chunk.finish_reason)
    assert tokens == LOGS
    assert [reason for reason in reasons if reason] == [FinishReason.LENGTH] * 2


async def test_what_a_reader_had_before_counts_when_the_log_says_otherwise() -> None:
    store = Store()
    store.written = [4, 0]
    stream = open_stream(store)
    stream.begin(await store.read("r"), (4, 0))
    stream.feed(TokenItem("r", 0, 2, pack_tokens([7, 99])))  # Redis lost the fourth token, another stands there now
    tokens, _ = await read_all(stream)
    assert tokens == [[], []]
    assert stream.ended is not None
    assert stream.ended.reason.startswith("stream_diverged")


async def test_a_long_log_comes_in_parts_and_others_get_their_turn_in_between() -> None:
    store = Store()
    tokens = list(range(3 * PART_TOKENS + 5))

    async def read(request_id: str) -> Standing:
        log = Log(tokens=[tokens, []], finished=[FinishReason.LENGTH, FinishReason.LENGTH])
        return Standing("done", "", "decode", 4, len(tokens), 0, Timeline(), log)

    stream = open_stream(store)
    stream._read = read
    stream.fall_behind()
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(len(seen))
            await asyncio.sleep(0)

    seen: list[TokenChunk] = []
    turning = asyncio.create_task(other())
    async for chunks in stream:
        seen += chunks
    turning.cancel()
    assert [token for chunk in seen if chunk.choice == 0 for token in chunk.token_ids] == tokens
    assert [len(chunk.token_ids) for chunk in seen] == [PART_TOKENS] * 3 + [5, 0]
    assert [chunk.finish_reason is not None for chunk in seen] == [False, False, False, True, True]
    assert {1, 2, 3, 4} <= set(turns)


@pytest.mark.parametrize(
    ("is_creator", "linger_s", "cancels", "lingers"),
    [
        (True, 0.0, True, False),
        (False, 0.0, False, False),
        (True, 5.0, False, True),
        (False, 5.0, False, True),
        (True, None, False, False),
        (False, None, False, False),
    ],
)
async def test_what_becomes_of_a_request_that_its_reader_leaves(
    is_creator: bool, linger_s: float | None, cancels: bool, lingers: bool
) -> None:
    store = Store()
    stream = open_stream(store, request=request(3), is_creator=is_creator, linger_s=linger_s)
    await stream.leave("test")
    assert (store.cancelled, store.lingers) == (["test"] if cancels else [], [5.0] if lingers else [])
    stream.feed_end(END)
    await stream.leave("again")
    assert "again" not in store.cancelled
    assert len(store.lingers) <= 1


async def test_nothing_is_read_behind_a_divergence_and_its_request_is_left() -> None:
    """Other tokens stand where the reader's do, and then come live behind them: not one of those is read."""
    store = Store()
    stream = open_stream(store)
    other = [token + 1000 for token in LOGS[0]]
    stream.feed(item(0, 0, 3))
    got = await anext(aiter(stream))
    assert [token for chunk in got for token in chunk.token_ids] == LOGS[0][:3]
    stream.feed(TokenItem("r", 0, 1, pack_tokens(other[1:2])))
    stream.feed(TokenItem("r", 0, 3, pack_tokens(other[3:4])))
    stream.feed_end(END)
    tokens = [token async for chunks in stream for chunk in chunks for token in chunk.token_ids]
    assert tokens == []
    assert stream.ended is not None
    assert (stream.ended.state, stream.has_diverged) == ("failed", True)
    await stream.leave("diverged")
    assert store.cancelled == ["diverged"]
