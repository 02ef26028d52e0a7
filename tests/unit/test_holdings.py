"""What a worker holds decides what it may claim."""

from __future__ import annotations

import dataclasses

from pipeline.protocol import FinishReason, LLMEngineOutput, Log
from pipeline.queue import Delivery
from tests.system import request
from workers.holdings import Held, Holdings, Task


def held(prompt: int, n: int = 1, log: Log | None = None) -> Held:
    item = request(prompt, n=n)
    log = log or Log.empty(n)
    delivery = Delivery(item.id, 1, "decode", "default", b"", b"", 0, 0, "api", prompt, log)
    return Held(Task(delivery, item, None))


async def test_blocks_cover_the_next_token_of_each_choice() -> None:
    assert held(15).blocks(16) == 1
    assert held(16).blocks(16) == 2
    assert held(16, n=3).blocks(16) == 6


async def test_a_delivery_is_complete_when_its_last_choice_has_ended() -> None:
    delivery = held(4, n=2)
    delivery.advance(LLMEngineOutput(delivery.id, 0, 0, [1], FinishReason.EOS))
    assert not delivery.complete.done()
    delivery.advance(LLMEngineOutput(delivery.id, 1, 0, [1, 2], FinishReason.LENGTH))
    assert delivery.complete.done()
    assert delivery.lengths == [1, 2]


async def test_a_finished_choice_of_the_log_is_not_open() -> None:
    assert held(4, n=2, log=Log(tokens=[[1], [2]], finished=[FinishReason.EOS, None])).open == {1}


async def test_a_later_delivery_of_the_same_request_is_not_removed_by_the_earlier_one() -> None:
    holdings = Holdings()
    first = held(4)
    second = Held(dataclasses.replace(first.task, delivery=dataclasses.replace(first.task.delivery, epoch=2)))
    holdings.add(first)
    holdings.add(second)
    holdings.remove(first)
    assert holdings.get(second.key) is second
    assert holdings.get(first.key) is None
    assert (len(holdings), holdings.choices(), holdings.prompt_tokens()) == (1, 1, 4)
