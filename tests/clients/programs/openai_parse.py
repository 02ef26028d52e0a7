"""Answers that become models of pydantic: `parse`, tools made of models, and a stream of what is parsed so far."""

from typing import Literal

import openai
import pydantic

MODEL = "baton-tiny"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]


class Day(pydantic.BaseModel):
    warm: bool
    wind: Literal["north", "south"]


class Weather(pydantic.BaseModel):
    """The weather of a city"""

    city: Literal["Paris", "Rome"]
    today: Day
    days: list[Day] = pydantic.Field(max_length=2)


client = openai.OpenAI(max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "seed": 1, "max_tokens": 300}

message = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
assert isinstance(message.parsed, Weather)
assert message.refusal is None

with client.chat.completions.stream(**asked, response_format=Weather) as stream:
    parts = [event.parsed for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion()
assert final.choices[0].message.parsed == message.parsed
assert any(isinstance(part, dict) and "city" in part for part in parts)

tools = [openai.pydantic_function_tool(Weather)]
answer = client.chat.completions.parse(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
(call,) = answer.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, Weather)

try:
    client.chat.completions.parse(**{**asked, "max_tokens": 3}, response_format=Weather)
except openai.LengthFinishReasonError as error:
    assert error.completion.usage.completion_tokens == 3
else:
    raise AssertionError("three tokens were parsed")
