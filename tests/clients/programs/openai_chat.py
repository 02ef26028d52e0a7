"""Chats as the README of OpenAI's package shows them: whole, streamed, with errors that have classes of their own."""

import openai

MODEL = "baton-tiny"
MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Tell me a short story about a runner."},
]

client = openai.OpenAI(max_retries=0)

models = client.models.list()
assert MODEL in [model.id for model in models]
assert client.models.retrieve(MODEL).id == MODEL

# whole
asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 200}
answer = client.chat.completions.create(**asked)
choice = answer.choices[0]
assert answer.object == "chat.completion" and answer.model == MODEL
assert choice.message.role == "assistant" and choice.message.content
assert choice.finish_reason in ("stop", "length")
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
assert answer._request_id

# streamed: the same text, and usage in the end
text = ""
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
    else:
        usage = chunk.usage
assert text == choice.message.content
assert usage.completion_tokens == answer.usage.completion_tokens

# the helper
with client.chat.completions.stream(**asked) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
assert kinds[-1] == "content.done" and "content.delta" in kinds
assert final.choices[0].message.content == text

# several answers, one seed, a stop string
drawn = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 7, "temperature": 1.0}
texts = [one.message.content for one in client.chat.completions.create(**drawn).choices]
assert texts == [one.message.content for one in client.chat.completions.create(**drawn).choices]
assert len(set(texts)) > 1
stop = text[5:9]
stopped = client.chat.completions.create(**asked, stop=stop).choices[0]
assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")

# log probabilities
answer = client.chat.completions.create(**{**asked, "max_completion_tokens": 5}, logprobs=True, top_logprobs=2)
assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [2] * 5

# headers beside the answer
raw = client.chat.completions.with_raw_response.create(**asked, extra_headers={"X-Request-Id": "mine"})
assert raw.headers["x-request-id"] == "mine"
assert raw.parse().choices[0].message.content == text

# errors
try:
    client.chat.completions.create(model="none-such", messages=MESSAGES)
except openai.NotFoundError as error:
    assert "none-such" in error.message and error.code == "model_not_found"
else:
    raise AssertionError("a model that is not there answered")
for stream in (False, True):
    try:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9, stream=stream)
    except openai.BadRequestError as error:
        assert error.param == "temperature" and error.request_id
    else:
        raise AssertionError("a temperature of 9 was taken")
