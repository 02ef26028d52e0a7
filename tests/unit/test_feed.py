"""Tokens of a stream become pieces of text; an interrupt ends the waiting."""

from __future__ import annotations

import asyncio

import pytest

from api.drain import Drain
from pipeline.answer_form import AnswerForm, with_form
from pipeline.errors import Draining
from pipeline.protocol import (
    BackendInput,
    EndItem,
    FinishReason,
    Request,
    SamplingOptions,
    StopConditions,
    Timeline,
    TokenItem,
    pack_tokens,
)
from pipeline.stream import RequestStream, TokenChunk
from pipeline.surface.feed import Choices, Feed
from tests import texts


def choices(*, by_token: bool, n: int = 1, stop: list[str] | None = None, tells: bool = False) -> Choices:
    body = BackendInput(
        request_id="r",
        model="m",
        token_ids=[1],
        stop_conditions=StopConditions(max_tokens=100, stop=stop),
        sampling_options=SamplingOptions(n=n),
    )
    body = with_form(body, AnswerForm(return_token_ids=tells))
    request = Request(id="r", kind="chat.completion", created_s=0, input=body)
    return Choices(texts.tokenizer("byte_level"), request, by_token=by_token)


def ids(text: str) -> list[int]:
    return texts.tokenizer("byte_level").encode(text, add_special_tokens=False)


def test_each_token_is_a_piece_however_many_came_together() -> None:
    tokens = ids("Hello world, hello")
    apart = choices(by_token=True).push([TokenChunk(0, 0, tokens, None)])
    assert len(apart) == len(tokens)
    together = choices(by_token=False).push([TokenChunk(0, 0, tokens, None)])
    assert together == [(0, "".join(text for _, text, _, _, _ in apart), (), None, None)]


@pytest.mark.parametrize("by_token", [True, False])
def test_the_last_piece_carries_the_end_and_what_was_held_back(by_token: bool) -> None:
    found = choices(by_token=by_token, n=2, stop=["END"])
    pieces = found.push(
        [TokenChunk(1, 0, ids("one EN"), FinishReason.LENGTH), TokenChunk(0, 0, ids("two END x"), None)]
    )
    assert [text for choice, text, _, _, _ in pieces if choice == 1][-1].endswith("EN")
    assert "".join(text for choice, text, _, _, _ in pieces if choice == 0) == "two "
    assert found.reasons == [FinishReason.STOP, FinishReason.LENGTH]
    assert found.are_complete
    assert found.push([TokenChunk(0, 9, ids("more"), None)]) == []


@pytest.mark.parametrize("by_token", [True, False])
def test_told_tokens_are_those_of_the_choice_with_or_without_text(by_token: bool) -> None:
    found = choices(by_token=by_token, stop=["END"], tells=True)
    tokens = ids("東京 END")
    pieces = found.push([TokenChunk(0, 0, tokens + ids(" x"), None)])
    assert [token for _, _, told, _, _ in pieces for token in told] == tokens
    assert "".join(text for _, text, _, _, _ in pieces) == "東京 "
    assert [len(told) for _, _, told, _, _ in pieces] == ([1] * len(tokens) if by_token else [len(tokens)])
    assert found.reasons == [FinishReason.STOP]


def test_a_stop_string_that_a_torn_character_completes_ends_the_choice() -> None:
    found = choices(by_token=True, stop=["EN\ufffd"])
    pieces = found.push([TokenChunk(0, 0, ids("one EN") + ids("東")[:1], FinishReason.LENGTH)])
    assert "".join(text for _, text, _, _, _ in pieces) == "one "
    assert (found.reasons, found.stop_string(0)) == ([FinishReason.STOP], "EN\ufffd")


def test_a_failed_choice_is_not_complete() -> None:
    found = choices(by_token=False)
    assert found.push([TokenChunk(0, 0, ids("one"), FinishReason.ERROR)]) == [(0, "one", (), None, None)]
    assert not found.are_complete


def stream() -> RequestStream:
    async def nothing(*_: object) -> None:
        return None

    return RequestStream(
        "r", 1, buffer_items=10, patience_s=1, read=nothing, cancel=nothing, forget=nothing, linger=nothing
    )


async def test_a_feed_gives_what_queued_up_and_then_the_end() -> None:
    source = stream()
    feed = Feed(source)
    source.feed(TokenItem("r", 0, 0, pack_tokens([5])))
    source.feed(TokenItem("r", 0, 1, pack_tokens([6]), "length"))
    source.feed_end(EndItem("r", "done", "", 1, 2, 0, "decode", Timeline()))
    chunks = await feed.first_tokens()
    assert chunks is not None
    assert [chunk.token_ids for chunk in chunks] == [[5], [6]]
    assert await feed.next() is None


async def test_an_interrupt_ends_a_wait_and_every_later_one() -> None:
    feed = Feed(stream())
    waiting = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    feed.interrupt()
    with pytest.raises(Draining):
        await waiting
    with pytest.raises(Draining):
        await feed.next()
    assert not waiting.cancelled()


async def test_a_cancelled_wait_stays_cancelled() -> None:
    feed = Feed(stream())
    waiting = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_draining_refuses_new_requests_and_interrupts_after_the_grace() -> None:
    drain = Drain(grace_s=0.0)
    drain.check()
    interrupted, spared = asyncio.Event(), asyncio.Event()
    with drain.interrupting(interrupted.set):
        with drain.interrupting(spared.set):
            pass
        drain.begin()
        drain.begin()
        with pytest.raises(Draining):
            drain.check()
        await interrupted.wait()
    assert not spared.is_set()
