"""Anthropic's package: messages, whole and streamed, with a tool and its result."""

import asyncio

import anthropic

MODEL = "baton-tiny"
MESSAGES = [{"role": "user", "content": "Tell me a short story about a runner."}]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

client = anthropic.Anthropic(max_retries=0)
asked = {"model": MODEL, "max_tokens": 200, "messages": MESSAGES, "extra_body": {"temperature": 0}}

message = client.messages.create(**asked)
assert message.role == "assistant" and message.stop_reason in ("end_turn", "max_tokens")
text = message.content[0].text
with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream) == text
    assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens

messages = [{"role": "user", "content": "What is the weather in Paris?"}]
one = {"type": "any", "disable_parallel_tool_use": True}
called = client.messages.create(**{**asked, "messages": messages}, tools=[TOOL], tool_choice=one)
assert called.stop_reason == "tool_use"
messages.append({"role": "assistant", "content": called.content})
results = [{"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"} for call in called.content]
messages.append({"role": "user", "content": results})
assert client.messages.create(**{**asked, "messages": messages}, tools=[TOOL]).content
assert client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 0


async def streamed() -> str:
    async with anthropic.AsyncAnthropic(max_retries=0) as client:
        async with client.messages.stream(**asked) as stream:
            return "".join([part async for part in stream.text_stream])


assert asyncio.run(streamed()) == text

try:
    client.messages.create(**{**asked, "model": "none-such"})
except anthropic.NotFoundError as error:
    assert "none-such" in error.message
else:
    raise AssertionError("a model that is not there answered")
