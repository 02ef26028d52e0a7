"""Vectors of texts: as numbers, and coded as the client asks by itself."""

import openai

client = openai.OpenAI(max_retries=0)
texts = ["a fox in the snow", "a ship", "a fox in the snow"]
answer = client.embeddings.create(model="baton-tiny", input=texts)
fox, ship, again = (one.embedding for one in answer.data)
assert len(fox) == len(ship) and fox != ship
plain = client.embeddings.create(model="baton-tiny", input=texts[0], encoding_format="float").data[0].embedding
for other in (again, plain):
    assert max(abs(one - another) for one, another in zip(fox, other, strict=True)) < 1e-5
assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
