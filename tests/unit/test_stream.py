"""A reader gets each (choice, index) once and in order, whatever the bus loses, repeats or reorders."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RedisUnavailable
from pipeline.protocol import EndItem, FinishReason, Log, Timeline, TokenItem, pack_tokens
from pipeline.queue import Standing
from pipeline.stream import RequestStream, TokenChunk
from tests.system import take

LOGS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
END = EndItem("r", "done", "", 4, 9, 0, "decode", Timeline())


class Store:
    """What Redis would answer: the log as far as it is written."""

    def __init__(self) -> None:
        self.written = [0, 0]
        self.ended = False
        self.reads = 0
        self.cancelled: list[str] = []

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

    async def forget(self, stream: RequestStream) -> None: ...


def open_stream(store: Store, buffer_items: int = 100) -> RequestStream:
    return RequestStream(
        "r", 2, buffer_items=buffer_items, patience_s=5, read=store.read, cancel=store.cancel, forget=store.forget
    )


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
        "r", 2, buffer_items=100, patience_s=5, read=read, cancel=store.cancel, forget=store.forget
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
