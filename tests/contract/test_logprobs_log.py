"""Log probabilities are as durable as their tokens: written with them at the hand-over and by steps, read with them, gone with them."""

from __future__ import annotations

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.logprobs import pack_logprobs
from pipeline.protocol import FinishReason, LLMEngineOutput
from pipeline.queue import StepItem, Verdict
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
