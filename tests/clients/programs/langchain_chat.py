"""LangChain: a chat model that streams, calls tools and answers in models of pydantic, over chats and over responses; embeddings."""

import asyncio
from typing import Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = "baton-tiny"
MESSAGES = [SystemMessage("You are brief."), HumanMessage("Tell me a short story about a runner.")]
QUESTION = "What is the weather in Paris?"


class Place(BaseModel):
    city: Literal["Paris", "Rome"]


class Weather(BaseModel):
    """The weather of a place"""

    place: Place
    warm: bool


@tool
def get_weather(place: Place, days: Literal[1, 2, 3]) -> str:
    """The weather of a place"""
    return f"21 degrees in {place.city} for {days} days"


# whole, streamed, in a chain, many at once
model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=200, max_retries=0, stream_usage=True)
answer = model.invoke(MESSAGES)
assert answer.text and answer.response_metadata["finish_reason"] in ("stop", "length")
whole = AIMessageChunk("")
for chunk in model.stream(MESSAGES):
    whole += chunk
assert whole.text == answer.text
for count in ("input_tokens", "output_tokens", "total_tokens"):
    assert whole.usage_metadata[count] == answer.usage_metadata[count]
chain = (
    ChatPromptTemplate.from_messages([("system", "You are brief."), ("user", "{asked}")]) | model | StrOutputParser()
)
assert chain.invoke({"asked": MESSAGES[1].content}) == answer.text
assert [one.text for one in model.batch([MESSAGES, MESSAGES])] == [answer.text] * 2


async def streamed() -> str:
    return "".join([chunk.text async for chunk in model.astream(MESSAGES)])


assert asyncio.run(streamed()) == answer.text

# tools: called because they must be, their results told; as they come
calling = model.bind_tools([get_weather], tool_choice="required", strict=True, parallel_tool_calls=False)
messages = [HumanMessage(QUESTION), calling.invoke(QUESTION)]
(call,) = messages[-1].tool_calls
messages.append(get_weather.invoke(call))
assert messages[-1].content.startswith("21 degrees in ")
assert isinstance(model.bind_tools([get_weather]).invoke(messages).text, str)
pieces = list(calling.stream(QUESTION))
assert sum(bool(piece.tool_call_chunks) for piece in pieces) > 3
whole = AIMessageChunk("")
for piece in pieces:
    whole += piece
assert whole.tool_calls[0]["args"] == call["args"]

# models of pydantic, in each way that there is
for method in ("json_schema", "function_calling"):
    assert isinstance(model.with_structured_output(Weather, method=method, strict=True).invoke(QUESTION), Weather)

# over responses
responses = ChatOpenAI(model=MODEL, temperature=0, max_tokens=200, max_retries=0, use_responses_api=True)
assert responses.invoke(MESSAGES).text == answer.text
assert "".join(chunk.text for chunk in responses.stream(MESSAGES)) == answer.text
assert isinstance(responses.with_structured_output(Weather).invoke(QUESTION), Weather)
calling = responses.bind_tools([get_weather], tool_choice="required", strict=True, parallel_tool_calls=False)
(call,) = calling.invoke(QUESTION).tool_calls
assert get_weather.invoke(call).content.startswith("21 degrees in ")

# texts and vectors
texts = OpenAI(model=MODEL, temperature=0, max_tokens=12, max_retries=0)
assert "".join(texts.stream("Once there was")) == texts.invoke("Once there was") != ""
embeddings = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False)  # else it would send OpenAI's token ids
fox, ship = embeddings.embed_documents(["a fox", "a ship"])
assert max(abs(one - other) for one, other in zip(fox, embeddings.embed_query("a fox"), strict=True)) < 1e-5
assert len(fox) == len(ship) and fox != ship
