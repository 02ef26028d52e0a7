"""Instructor: models of pydantic as answers, in each of its modes; lists and parts of them as they come."""

import asyncio
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

MODEL = "baton-tiny"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a model this small would never end with what it may add

    city: Literal["Paris", "Rome"]


class Weather(BaseModel):
    """The weather of a place"""

    model_config = ConfigDict(extra="forbid")

    place: Place
    days: list[Literal["sun", "rain"]] = Field(max_length=3)


asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 300, "temperature": 0, "max_retries": 0}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    weather, completion = client.create_with_completion(**asked, response_model=Weather)
    assert isinstance(weather, Weather)
    assert completion.usage.completion_tokens > 0
    parts = list(client.create_partial(**asked, response_model=Weather))
    assert len(parts) > 2 and parts[-1].place.city == weather.place.city


async def several() -> list[Weather]:
    client = instructor.from_openai(openai.AsyncOpenAI(max_retries=0), mode=instructor.Mode.JSON_SCHEMA)
    return await asyncio.gather(*(client.create(**asked, response_model=Weather) for _ in range(3)))


assert all(isinstance(weather, Weather) for weather in asyncio.run(several()))
