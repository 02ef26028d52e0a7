"""LiteLLM: one function for all servers, by the provider that it takes this one for."""

import asyncio
import json
import os
from typing import Literal

import litellm
import pydantic

MODEL = "baton-tiny"
MESSAGES = [{"role": "user", "content": "Tell me a short story about a runner."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]

litellm.suppress_debug_info = True
base = os.environ["OPENAI_BASE_URL"]
ways = {
    "openai": {"model": f"openai/{MODEL}", "api_base": base},
    "hosted_vllm": {"model": f"hosted_vllm/{MODEL}", "api_base": base},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": os.environ["ANTHROPIC_BASE_URL"]},
}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    warm: bool


texts = set()
for way in ways.values():
    asked = {**way, "messages": MESSAGES, "temperature": 0, "max_tokens": 200, "num_retries": 0}
    answer = litellm.completion(**asked)
    text = answer.choices[0].message.content
    texts.add(text)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.content == text
    assert built.usage.completion_tokens == answer.usage.completion_tokens

    parsed = litellm.completion(**asked, response_format=Weather).choices[0].message.content
    Weather.model_validate_json(parsed)
assert len(texts) == 1 and texts != {""}

for name in (
    "openai",
    "anthropic",
):  # as hosted_vllm it takes `additionalProperties` away, and a model this small never ends
    called = litellm.completion(
        **ways[name],
        messages=MESSAGES,
        max_tokens=200,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        num_retries=0,
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    (call,) = called.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


async def streamed() -> str:
    chunks = await litellm.acompletion(**ways["openai"], messages=MESSAGES, temperature=0, max_tokens=200, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


assert {asyncio.run(streamed())} == texts

response = litellm.responses(**ways["openai"], input=MESSAGES[0]["content"], temperature=0, max_output_tokens=200)
assert {response.output[0].content[0].text} == texts
vectors = litellm.embedding(**ways["openai"], input=["a fox", "a ship"]).data
assert len(vectors) == 2 and vectors[0]["embedding"] != vectors[1]["embedding"]

try:
    litellm.completion(model="openai/none-such", api_base=base, messages=MESSAGES, num_retries=0)
except litellm.NotFoundError as error:
    assert "none-such" in str(error)
else:
    raise AssertionError("a model that is not there answered")
