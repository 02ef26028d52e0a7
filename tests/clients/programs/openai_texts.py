"""Completions: of a text and of several, streamed, echoed, with log probabilities."""

import openai

MODEL = "baton-tiny"

client = openai.OpenAI(max_retries=0)

asked = {"model": MODEL, "prompt": "Once there was", "max_tokens": 12, "temperature": 0}
answer = client.completions.create(**asked)
text = answer.choices[0].text
assert answer.object == "text_completion" and text
streamed = client.completions.create(**asked, stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == text
assert client.completions.create(**asked, echo=True).choices[0].text == "Once there was" + text
many = client.completions.create(**{**asked, "prompt": ["Once there was", "The fox"]}, logprobs=1)
assert [choice.index for choice in many.choices] == [0, 1] and many.choices[0].text == text
assert len(many.choices[1].logprobs.tokens) == len(many.choices[1].logprobs.token_logprobs)
