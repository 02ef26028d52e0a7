"""Log probabilities are as durable as their tokens: written with them at the hand-over and by steps, read with them, gone with them."""

from __future__ import annotations

from msgspec import structs

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.logprobs import pack_logprobs
from pipeline.protocol import FinishReason, LLMEngineOutput
from pipeline.queue import PROMPT_PART_BYTES, StepItem, Verdict
from tests.contract.test_scripts import API, DECODER, HANDLE, ID, PREFILLER, Story, reach


def output(choice: int, index: int, tokens: list[int], reason: FinishReason | None = None) -> LLMEngineOutput:
    logprobs = [-0.5 * token for token in tokens]
    return LLMEngineOutput(
        ID, choice, index, tokens, reason, logprobs, None, [[(t, -0.25 * t), (9, -3.0)] for t in tokens]
    )


async def test_log_probabilities_stand_where_their_tokens_do(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    story = Story(connection)
    await reach(story, "running prefill")
    firsts = [output(choice, 0, [10 + choice]) for choice in (0, 1)]
    for _ in range(2):  # every script may be called twice
        await story.queue.handover(story.delivery, PREFILLER, firsts, HANDLE, cached_tokens=1)
    delivery = await story.claim("decode", DECODER, "second")
    assert delivery is not None
    assert delivery.log.tokens == [[10], [11]]
    steps = [
        output(0, 1, [20, 21]),
        output(1, 1, [30]),
        output(0, 3, [22], FinishReason.EOS),
        output(1, 2, [31], FinishReason.EOS),
    ]
    items = [StepItem(ID, API, delivery.epoch, step) for step in steps]
    for _ in range(2):
        assert await story.queue.step(DECODER, items) == [Verdict.ACCEPTED] * 4
    standing = await story.queue.attach(ID, watch=False)
    assert standing is not None
    assert standing.log.tokens == [[10, 20, 21, 22], [11, 30, 31]]
    expected = [pack_logprobs(output(choice, 0, tokens)) for choice, tokens in enumerate(standing.log.tokens)]
    assert standing.logprobs == expected
    await story.queue.end(ID, "done", worker=DECODER, epoch=delivery.epoch)
    for choice in (0, 1):
        assert await connection.command("TTL", story.queue.keys.logprobs(ID, choice)) > 0
    await connection.close()


async def test_a_prompt_s_are_there_before_the_first_token_is_and_stay_what_they_were(redis_url: str) -> None:
    connection = Connection(RedisSettings(url=redis_url))
    story = Story(connection)
    await reach(story, "running prefill")
    records = bytes(range(251)) * (2 * PROMPT_PART_BYTES // 251)
    first = LLMEngineOutput(ID, 0, 0, [10], prompt_logprobs=records)
    await story.queue.keep_prompt(PREFILLER, ID, story.delivery.epoch, records[:PROMPT_PART_BYTES])
    again = [structs.replace(first, prompt_logprobs=b"\0" * PROMPT_PART_BYTES + records[PROMPT_PART_BYTES:])]
    for _ in range(2):  # the first attempt came as far as one part
        await story.queue.handover(story.delivery, PREFILLER, again, HANDLE, cached_tokens=1)
    assert await story.queue.prompt_logprobs(ID) == records
    delivery = await story.claim("decode", DECODER, "second")
    assert delivery is not None
    recomputed = StepItem(
        ID, API, delivery.epoch, LLMEngineOutput(ID, 0, 1, [11], prompt_logprobs=b"\1" * len(records))
    )
    assert await story.queue.step(DECODER, [recomputed]) == [Verdict.ACCEPTED]
    assert await story.queue.prompt_logprobs(ID) == records
    await connection.command(
        "DEL", story.queue.keys.prompt_logprobs(ID)
    )  # as Redis may lose it: who computes it brings it back
    assert await story.queue.step(DECODER, [recomputed]) == [Verdict.ACCEPTED]
    assert await story.queue.prompt_logprobs(ID) == b"\1" * len(records)
    await story.queue.end(ID, "cancelled")
    assert await connection.command("TTL", story.queue.keys.prompt_logprobs(ID)) > 0
    await story.queue.erase(ID)
    assert await story.queue.prompt_logprobs(ID) == b""
    await connection.close()
