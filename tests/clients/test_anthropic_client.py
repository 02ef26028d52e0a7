"""Anthropic's official client against a running system with the built-in model, as its users write it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pydantic
import pytest
import pytest_asyncio

from tests.serving import Served
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION: Any = [{"role": "user", "content": "Tell me a short story about a runner."}]
GREEDY = {"temperature": 0}  # which this client has no argument for any more
ASKED: Any = {"model": POOL, "max_tokens": 60, "messages": QUESTION, "extra_body": GREEDY}
TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(served: Served) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    text: str = block.text
    return text


async def test_a_message(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(**ASKED)
    assert message.id.startswith(f"msg_{POOL}-")
    assert (message.type, message.role, message.model) == ("message", "assistant", POOL)
    assert text_of(message)
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.stop_sequence is None
    assert 0 < message.usage.output_tokens <= 60
    assert message._request_id


async def test_a_stream_helper_reads_the_same_message(client: anthropic.AsyncAnthropic) -> None:
    whole = await client.messages.create(**ASKED)
    async with client.messages.stream(**ASKED) as stream:
        text = "".join([part async for part in stream.text_stream])
        final = await stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


async def test_raw_events_come_in_their_order(client: anthropic.AsyncAnthropic) -> None:
    events = [event async for event in await client.messages.create(**ASKED, stream=True)]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


@pytest.mark.parametrize("streams", [False, True])
async def test_the_stop_sequence_is_told(client: anthropic.AsyncAnthropic, streams: bool) -> None:
    text = text_of(await client.messages.create(**ASKED))
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    asked = ASKED | {"stop_sequences": ["never said", stop]}
    if streams:
        async with client.messages.stream(**asked) as stream:
            message: Any = await stream.get_final_message()
    else:
        message = await client.messages.create(**asked)
    assert text_of(message) == text[: text.index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


async def test_the_limit_is_told(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(**ASKED | {"max_tokens": 3})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


@pytest.mark.parametrize(
    "more", [{}, {"system": "Be kind."}, {"tools": [TOOL]}, {"system": [{"type": "text", "text": "Be kind."}]}]
)
async def test_tokens_are_counted_as_they_are_used(client: anthropic.AsyncAnthropic, more: Any) -> None:
    counted = await client.messages.count_tokens(model=POOL, messages=QUESTION, **more)
    usage = (await client.messages.create(**ASKED | {"max_tokens": 1} | more)).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


async def test_prompts_that_are_too_long_are_counted_and_not_taken(client: anthropic.AsyncAnthropic) -> None:
    long: Any = [{"role": "user", "content": "run " * 9000}]
    assert (await client.messages.count_tokens(model=POOL, messages=long)).input_tokens > 4096
    with pytest.raises(anthropic.BadRequestError, match="context of 4096 tokens"):
        await client.messages.create(**ASKED | {"messages": long})


async def test_a_conversation_with_tools_goes_on(client: anthropic.AsyncAnthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo", "days": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sun"}]}
    messages = [*QUESTION, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    message = await client.messages.create(**ASKED | {"messages": messages, "tools": [TOOL]})
    assert message.content
    again = [*messages, {"role": "assistant", "content": message.content}, {"role": "user", "content": "More?"}]
    if message.stop_reason != "tool_use":
        await client.messages.create(**ASKED | {"messages": again, "tools": [TOOL]})


async def test_a_begun_answer_goes_on(client: anthropic.AsyncAnthropic) -> None:
    text = text_of(await client.messages.create(**ASKED))
    words = text.split(" ")
    begun = " ".join(words[:4])
    rest = await client.messages.create(**ASKED | {"messages": [*QUESTION, {"role": "assistant", "content": begun}]})
    assert text.startswith(begun + text_of(rest)[:8])


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ({"model": "none-such"}, anthropic.NotFoundError, "none-such"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, anthropic.BadRequestError, "text only"),
        ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError, "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, anthropic.BadRequestError, "tools of your own"),
    ],
)  # fmt: skip
async def test_errors_are_the_clients_own(
    client: anthropic.AsyncAnthropic, asked: Any, kind: type[anthropic.APIStatusError], message: str
) -> None:
    with pytest.raises(kind, match=message) as raised:
        await client.messages.create(**ASKED | asked)
    body: Any = raised.value.body
    assert raised.value.request_id
    assert (body["type"], body["request_id"]) == ("error", raised.value.request_id)
    assert set(body["error"]) == {"type", "message"}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_tool_is_called(client: anthropic.AsyncAnthropic, choice: Any) -> None:
    asked = ASKED | {"tools": [TOOL], "tool_choice": choice | {"disable_parallel_tool_use": True}}
    whole = await client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.type == "tool_use" and call.name == "weather"
    given: Any = call.input
    assert given["city"] in ("Oslo", "Rome") and 1 <= given["days"] <= 9
    async with client.messages.stream(**asked) as stream:
        final = await stream.get_final_message()
    (streamed,) = final.content
    assert streamed.type == "tool_use" and (streamed.name, streamed.input) == (call.name, call.input)


async def test_an_answer_is_parsed(client: anthropic.AsyncAnthropic) -> None:
    class City(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        is_large: bool

    message = await client.messages.parse(**ASKED, output_format=City)
    assert isinstance(message.parsed_output, City)


async def test_the_synchronous_client(served: Served) -> None:
    def read() -> tuple[str, str]:
        with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
            message = client.messages.create(**ASKED)
            with client.messages.stream(**ASKED) as stream:
                return "".join(stream.text_stream), text_of(message)

    streamed, whole = await asyncio.to_thread(read)
    assert streamed == whole
