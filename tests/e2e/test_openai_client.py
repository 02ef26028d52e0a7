"""The official client against a running system with the built-in model: what it reads is what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from pipeline.tokenizer import Conversation, Tokenizer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION: Any = [{"role": "user", "content": "Tell me a short story about a runner."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(default_redis_server, tmp_path_factory.mktemp("served"), f"pools.{POOL}.engine=torch") as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served.openai() as client:
        yield client


async def read_chat(stream: Any, n: int = 1) -> tuple[list[str], list[str | None], Any]:
    """Texts, finish reasons and usage; checks ids and the order of chunks."""
    texts, reasons, usage, ids = [""] * n, [None] * n, None, set()
    started: set[int] = set()
    async for chunk in stream:
        ids.add((chunk.id, chunk.created, chunk.model))
        assert usage is None, "nothing follows the usage"
        if not chunk.choices:
            usage = chunk.usage
            continue
        (choice,) = chunk.choices
        assert reasons[choice.index] is None, "nothing follows the finish of a choice"
        if choice.index not in started:
            started.add(choice.index)
            assert (choice.delta.role, choice.delta.content) == ("assistant", "")
        elif choice.finish_reason is None:
            assert choice.delta.content
            texts[choice.index] += choice.delta.content
        reasons[choice.index] = choice.finish_reason
    assert len(ids) == 1
    return texts, reasons, usage


async def test_a_streamed_chat_is_the_whole_one(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    whole = await client.chat.completions.create(**asked)
    assert whole.id.startswith(f"chatcmpl-{POOL}-")
    assert (whole.object, whole.model, len(whole.choices)) == ("chat.completion", POOL, 1)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.content.isprintable()

    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    texts, reasons, usage = await read_chat(stream)
    assert texts == [choice.message.content]
    assert reasons == [choice.finish_reason]
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens == len(prompt_ids(QUESTION))


def prompt_ids(messages: Any) -> list[int]:
    tokenizer = Tokenizer.load("baton-tiny")
    return tokenizer.encode(tokenizer.render(Conversation(messages=messages)), add_special_tokens=False)


async def test_usage_comes_only_when_asked(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=POOL, messages=QUESTION, max_tokens=3, stream=True)
    assert (await read_chat(stream))[2] is None


async def test_several_choices_are_apart_and_seeded(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "messages": QUESTION, "max_tokens": 24, "n": 3, "seed": 11, "temperature": 1.5}
    whole = await client.chat.completions.create(**asked)
    contents = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(contents)) == 3
    texts, reasons, _ = await read_chat(await client.chat.completions.create(**asked, stream=True), 3)
    assert texts == contents
    assert reasons == [choice.finish_reason for choice in whole.choices]
    other = await client.chat.completions.create(**asked | {"seed": 12})
    assert [choice.message.content for choice in other.choices] != contents


async def test_completions_take_text_and_ids(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": POOL, "temperature": 0, "max_tokens": 16}
    text = await client.completions.create(prompt="The runner", **asked)
    assert text.id.startswith(f"cmpl-{POOL}-")
    assert text.object == "text_completion"
    ids = Tokenizer.load("baton-tiny").encode("The runner", add_special_tokens=True)
    assert (await client.completions.create(prompt=ids, **asked)).choices[0].text == text.choices[0].text
    chunks = [chunk async for chunk in await client.completions.create(prompt=["The runner"], stream=True, **asked)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        text.choices[0].finish_reason
    ]


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_cuts_text_and_usage(client: openai.AsyncOpenAI, include: bool) -> None:
    asked: Any = {"model": POOL, "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    whole = await client.chat.completions.create(**asked)
    content = whole.choices[0].message.content or ""
    stop = content[len(content) // 2 : len(content) // 2 + 5]
    end = content.index(stop) + (len(stop) if include else 0)
    extra: Any = {"stop": ["never in it", stop], "extra_body": {"include_stop_str_in_output": include}}
    cut = await client.chat.completions.create(**asked, **extra)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (content[:end], "stop")
    assert cut.usage is not None
    assert whole.usage is not None
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    texts, reasons, _ = await read_chat(await client.chat.completions.create(**asked, **extra, stream=True))
    assert (texts, reasons) == ([content[:end]], ["stop"])


async def test_a_repeated_prompt_is_cached(client: openai.AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 8}]
    usages = [
        (await client.chat.completions.create(model=POOL, messages=long, max_completion_tokens=2)).usage
        for _ in range(2)
    ]
    first, second = [usage.prompt_tokens_details.cached_tokens for usage in usages]  # type: ignore[union-attr]
    assert first == 0
    assert second >= len(prompt_ids(long)) - 16


async def test_many_clients_at_once_get_their_own_answers(client: openai.AsyncOpenAI) -> None:

    async def ask(number: int) -> str:
        messages: Any = [{"role": "user", "content": f"What is {number} plus {number}?"}]
        asked: Any = {"model": POOL, "messages": messages, "temperature": 0, "max_tokens": 12}
        texts, _, _ = await read_chat(await client.chat.completions.create(**asked, stream=True))
        return texts[0]

    together = await asyncio.gather(*(ask(number) for number in range(12)))
    assert together == [await ask(number) for number in range(12)]


async def test_errors_are_the_clients_own_kinds(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-unknown", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model=POOL, messages=QUESTION, max_tokens=1_000_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as image:
        content: Any = [{"type": "image_url", "image_url": {"url": "data:"}}]
        await client.chat.completions.create(model=POOL, messages=[{"role": "user", "content": content}])
    assert image.value.param == "messages[0].content[0].type"


async def test_models_are_the_pools(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [POOL]
    assert (await client.models.retrieve(POOL)).owned_by == "baton"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("none")


async def test_nothing_is_left(served: Served) -> None:
    await served.system.until(served.rests, 10)
    assert "Traceback" not in served.api_log()


async def test_token_ids_stand_beside_their_text(client: openai.AsyncOpenAI) -> None:
    tokenizer = Tokenizer.load("baton-tiny")
    prompt = tokenizer.encode("The runner", add_special_tokens=True)
    asked: Any = {"model": POOL, "prompt": "The runner", "max_tokens": 30, "temperature": 0}
    told: Any = {"extra_body": {"return_token_ids": True}}
    whole = await client.completions.create(**asked, **told)
    (choice,) = whole.choices
    assert choice.text == tokenizer.decode(choice.token_ids)  # type: ignore[attr-defined]
    assert choice.prompt_token_ids == prompt  # type: ignore[attr-defined]
    chunks = [chunk.choices[0] async for chunk in await client.completions.create(**asked, **told, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [token for chunk in chunks for token in chunk.token_ids] == choice.token_ids  # type: ignore[attr-defined]
    assert all(len(chunk.token_ids) == 1 for chunk in chunks[:-1])  # type: ignore[attr-defined]
