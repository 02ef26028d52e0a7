"""Responses: whole, streamed, parsed, in turns, with functions, and in the background."""

import json
import time
from typing import Literal

import openai
import pydantic

MODEL = "baton-tiny"
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    warm: bool


client = openai.OpenAI(max_retries=0)
asked = {"model": MODEL, "input": "Tell me a story about a fox.", "temperature": 0, "max_output_tokens": 40}

# whole and streamed
response = client.responses.create(**asked, instructions="Be brief.", metadata={"team": "a"})
assert response.status in ("completed", "incomplete") and response.output_text
assert response.metadata == {"team": "a"}
text = ""
for event in client.responses.create(**asked, instructions="Be brief.", stream=True):
    if event.type == "response.output_text.delta":
        text += event.delta
assert text == response.output_text
with client.responses.stream(**asked, instructions="Be brief.") as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            assert text.startswith(event.snapshot)
    if response.status == "completed":
        assert stream.get_final_response().output_text == text

# it goes on
following = client.responses.create(**{**asked, "input": "And then?"}, previous_response_id=response.id)
assert following.previous_response_id == response.id
assert following.usage.input_tokens > response.usage.input_tokens
assert client.responses.retrieve(following.id).output_text == following.output_text
assert client.responses.input_items.list(following.id).data

# parsed
parsed = client.responses.parse(model=MODEL, input="The weather?", text_format=Weather, max_output_tokens=100)
assert isinstance(parsed.output_parsed, Weather)

# a function and its result
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
called = client.responses.create(
    model=MODEL, input=messages, tools=[FUNCTION], tool_choice="required", parallel_tool_calls=False
)
(call,) = [item for item in called.output if item.type == "function_call"]
assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
messages += called.output
messages.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
told = client.responses.create(model=MODEL, input=messages, tools=[FUNCTION], max_output_tokens=20)
assert told.output

# in the background
queued = client.responses.create(**asked, background=True)
assert queued.status in ("queued", "in_progress")
while (current := client.responses.retrieve(queued.id)).status in ("queued", "in_progress"):
    time.sleep(0.05)
assert current.output_text == client.responses.create(**asked).output_text

# a stream of the background that is broken off and goes on
events = []
with client.responses.create(**asked, background=True, stream=True) as stream:
    for event in stream:
        events.append(event)
        if len(events) == 8:
            break
response_id, last = events[0].response.id, events[-1].sequence_number
events += client.responses.retrieve(response_id, stream=True, starting_after=last)
assert [event.sequence_number for event in events] == list(range(len(events)))
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == current.output_text

# ended and forgotten
long = {**asked, "max_output_tokens": 1500, "extra_body": {"ignore_eos": True}}
running = client.responses.create(**long, background=True)
assert client.responses.cancel(running.id).status == "cancelled"
client.responses.delete(response.id)
try:
    client.responses.retrieve(response.id)
except openai.NotFoundError as error:
    assert error.code == "request_not_found"
else:
    raise AssertionError("a deleted response was there")
