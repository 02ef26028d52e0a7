"""Programs as users of the official `openai` package write them, against a real Baton on the built-in model: tools, schemas, reasoning,
log probabilities, penalties, echo and the best of several."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import pytest_asyncio
from openai.lib.streaming.chat import ChunkEvent, FunctionToolCallArgumentsDoneEvent

from tests.serving import Served
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"additionalProperties": False}}},
]  # fmt: skip


class Weather(pydantic.BaseModel):
    """What the model is to answer in."""

    city: Literal["Paris", "Rome"]
    warm: bool


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served.openai() as client:
        yield client


def weather_call(call: Any) -> dict[str, Any]:
    """The arguments of a call that is whole."""
    assert (call.type, call.function.name) == ("function", "get_weather")
    arguments: dict[str, Any] = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
    return arguments


async def test_a_required_call_is_made_and_its_result_is_told(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "messages": QUESTION, "tools": TOOLS[:1], "tool_choice": "required", "seed": 3}
    answer = await client.chat.completions.create(**asked, parallel_tool_calls=False)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    weather_call(call)
    told: Any = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    last = await client.chat.completions.create(model=POOL, messages=told, tools=TOOLS, max_tokens=20, seed=3)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert last.usage and answer.usage and last.usage.prompt_tokens > answer.usage.prompt_tokens


async def test_a_named_call_streams_its_arguments(client: openai.AsyncOpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    asked: Any = {"model": POOL, "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "seed": 5, "n": 2}
    whole = await client.chat.completions.create(**asked)
    ids: list[str] = ["", ""]
    arguments, pieces, reasons = ["", ""], [0, 0], ["", ""]
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for told in chunk.choices:
            reasons[told.index] = told.finish_reason or reasons[told.index]
            for call in told.delta.tool_calls or []:
                ids[told.index] = call.id or ids[told.index]
                assert call.function is not None
                arguments[told.index] += call.function.arguments or ""
                pieces[told.index] += 1
    assert reasons == ["tool_calls"] * 2 and min(pieces) > 3
    for index, one in enumerate(whole.choices):
        (call,) = one.message.tool_calls or []
        weather_call(call)
        assert call.id.startswith("call_") and ids[index].startswith("call_")
        assert call.function.arguments == arguments[index]  # type: ignore[union-attr]


async def test_the_streaming_helper_tells_when_arguments_are_whole(client: openai.AsyncOpenAI) -> None:
    done: list[FunctionToolCallArgumentsDoneEvent] = []
    async with client.chat.completions.stream(
        model=POOL, messages=QUESTION, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1
    ) as stream:
        async for event in stream:
            if isinstance(event, FunctionToolCallArgumentsDoneEvent):
                done.append(event)
            elif isinstance(event, ChunkEvent):
                assert event.chunk.model == POOL
    final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert calls and [call.function.name for call in calls] == [event.name for event in done]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_model_writes_as_a_call_is_one(client: openai.AsyncOpenAI, stream: bool) -> None:
    """A tiny model calls nothing by itself, so a grammar makes it write what a large one would."""
    written = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}</tool_call>'
    extra = {"structured_outputs": {"choice": ["Let me see. " + written]}}
    asked: Any = {"model": POOL, "messages": QUESTION, "tools": TOOLS, "max_tokens": 200, "extra_body": extra}
    async with client.chat.completions.stream(**asked) as streamed:
        final = await streamed.get_final_completion()
    answer = final if stream else await client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    (call,) = message.tool_calls or []
    assert weather_call(call) == {"city": "Rome", "days": 2}
    plain = await client.chat.completions.create(**(asked | {"tools": openai.omit}))
    assert plain.choices[0].message.content == "Let me see. " + written


async def test_an_answer_is_parsed_into_a_model_of_ones_own(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(model=POOL, messages=QUESTION, response_format=Weather, seed=2)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    async with client.chat.completions.stream(model=POOL, messages=QUESTION, response_format=Weather, seed=2) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


async def test_log_probabilities_stand_beside_their_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=POOL, messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3, stop=["zzz"]
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    assert len(told.content) == 8
    for token in told.content:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob) and len(token.top_logprobs) == 3
    assert "".join(token.token for token in told.content) == answer.choices[0].message.content


async def test_penalties_and_biases_change_what_is_said(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "prompt": "the fox the fox the fox", "max_tokens": 40, "temperature": 0}
    plain = await client.completions.create(**asked)
    for changed in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 2.0}}):
        assert (await client.completions.create(**asked, **changed)).choices[0].text != plain.choices[0].text
    token = (await client.completions.create(**asked, extra_body={"return_token_ids": True})).choices[0].token_ids[0]  # type: ignore[attr-defined]
    banned = await client.completions.create(
        **asked, logit_bias={str(token): -100}, extra_body={"return_token_ids": True}
    )
    assert token not in banned.choices[0].token_ids  # type: ignore[attr-defined]


async def test_a_prompt_is_echoed_and_the_best_of_some_is_told(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "prompt": "Once there was", "max_tokens": 6, "seed": 4}
    plain = (await client.completions.create(**asked)).choices[0].text
    assert (await client.completions.create(**asked, echo=True)).choices[0].text == "Once there was" + plain
    streamed = [
        chunk.choices[0].text async for chunk in await client.completions.create(**asked, echo=True, stream=True)
    ]
    assert "".join(streamed) == "Once there was" + plain
    best = await client.completions.create(**asked, best_of=5, n=2)
    all_of_them = await client.completions.create(**asked, n=5, logprobs=0)
    ranked = sorted(all_of_them.choices, key=lambda one: -sum(one.logprobs.token_logprobs) / len(one.logprobs.tokens))  # type: ignore[union-attr, arg-type]
    assert [one.text for one in best.choices] == [one.text for one in ranked[:2]]
    assert [one.index for one in best.choices] == [0, 1] and best.choices[0].logprobs is None
    assert best.usage and all_of_them.usage and best.usage.completion_tokens == all_of_them.usage.completion_tokens


async def test_several_prompts_have_one_answer(client: openai.AsyncOpenAI) -> None:
    prompts = ["Once there was", "The fox", "A"]
    asked: Any = {"model": POOL, "max_tokens": 6, "seed": 4, "n": 2}
    answer = await client.completions.create(prompt=prompts, **asked)
    alone = [await client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [choice.text for one in alone for choice in one.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(answer.usage, field) == sum(getattr(one.usage, field) for one in alone)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(prompt=["a", "b" * 20_000], **asked)
    assert refused.value.param == "prompt[1]"


async def test_usage_comes_with_each_chunk_for_those_who_ask(client: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(
        model=POOL,
        messages=QUESTION,
        max_tokens=5,
        stream=True,
        stream_options=options,
        extra_body={"ignore_eos": True},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 5


async def test_nothing_is_left(served: Served) -> None:
    await served.system.until(served.rests, 10)
    assert "Traceback" not in served.api_log()
