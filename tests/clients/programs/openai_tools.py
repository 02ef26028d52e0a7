"""A function that the model must call, its result, and the call as it is streamed."""

import json

import openai

MODEL = "baton-tiny"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "enum": [1, 2, 3]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS, "strict": True},
    }
]


def get_weather(city: str, days: int) -> str:
    assert city in ("Paris", "Rome") and days in (1, 2, 3)
    return f"21 degrees in {city} for {days} days"


client = openai.OpenAI(max_retries=0)
asked = {"model": MODEL, "tools": TOOLS, "temperature": 0, "parallel_tool_calls": False}

# the loop that everybody writes
messages = list(MESSAGES)
answer = client.chat.completions.create(**asked, messages=messages, tool_choice="required").choices[0]
assert answer.finish_reason == "tool_calls"
messages.append(answer.message)
for call in answer.message.tool_calls:
    result = get_weather(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
last = client.chat.completions.create(**asked, messages=messages, max_tokens=20)
assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")

# the arguments as they come
named = {"type": "function", "function": {"name": "get_weather"}}
name, arguments, pieces = "", "", 0
for chunk in client.chat.completions.create(**asked, messages=MESSAGES, tool_choice=named, stream=True):
    for call in chunk.choices[0].delta.tool_calls or []:
        name += call.function.name or ""
        arguments += call.function.arguments or ""
        pieces += 1
assert name == "get_weather" and pieces > 3
get_weather(**json.loads(arguments))

# the helper parses them
tool = {"type": "function", "function": {**TOOLS[0]["function"]}}
with client.chat.completions.stream(
    model=MODEL, messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
) as stream:
    done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
assert [event.name for event in done] == ["get_weather"]
get_weather(**done[0].parsed_arguments)
