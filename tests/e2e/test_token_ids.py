"""Token ids in, token ids out, on a pool that has no tokenizer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 9, 300, 17]
ASKED: Any = {"model": POOL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
TOLD: Any = {"extra_body": {"return_token_ids": True, "ignore_eos": True}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bare(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A pool without tokenizer, of a folder that holds nothing but a configuration."""
    folder = tmp_path_factory.mktemp("bare")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 2048, "eos_token_id": 2}))
    settings = (f"pools.{POOL}.model={model}", f"pools.{POOL}.tokenizer=none")
    async with serving(default_redis_server, folder, *settings) as served:
        yield served


async def streamed(client: openai.AsyncOpenAI, n: int = 1, **asked: Any) -> list[list[Any]]:
    """The chunks of each choice; checks that only the first of each tells the prompt and only the last has an end."""
    found: list[list[Any]] = [[] for _ in range(n)]
    async for chunk in await client.completions.create(**asked, n=n, stream=True):
        (choice,) = chunk.choices
        found[choice.index].append(choice)
    for chunks in found:
        assert [getattr(choice, "prompt_token_ids", None) for choice in chunks] == [PROMPT] + [None] * (len(chunks) - 1)
        assert [choice.finish_reason for choice in chunks][:-1] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"
    return found


async def test_a_pool_without_tokenizer_answers_in_token_ids(bare: Served) -> None:
    async with bare.openai() as client:
        whole = await client.completions.create(**ASKED, **TOLD)
        (choice,) = whole.choices
        token_ids = choice.token_ids  # type: ignore[attr-defined]
        assert (choice.text, choice.prompt_token_ids, len(token_ids)) == ("", PROMPT, 12)  # type: ignore[attr-defined]
        (chunks,) = await streamed(client, **ASKED, **TOLD)
    assert [chunk.token_ids for chunk in chunks] == [*([token_id] for token_id in token_ids), []]
    assert {chunk.text for chunk in chunks} == {""}


async def test_several_choices_tell_their_own_tokens(bare: Served) -> None:
    async with bare.openai() as client:
        asked = {**ASKED, "temperature": 1, "seed": 3}
        whole = await client.completions.create(**asked, **TOLD, n=3)
        chunks = await streamed(client, 3, **asked, **TOLD)
    expected = [choice.token_ids for choice in whole.choices]  # type: ignore[attr-defined]
    assert [[token for chunk in choice for token in chunk.token_ids] for choice in chunks] == expected
    assert len({tuple(token_ids) for token_ids in expected}) == 3


async def test_without_asking_there_is_an_end_and_no_tokens(bare: Served) -> None:
    async with bare.openai() as client:
        whole = await client.completions.create(**ASKED)
    assert (whole.choices[0].text, getattr(whole.choices[0], "token_ids", None)) == ("", None)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"prompt": "text"}, "prompt"),
        ("completions", {"prompt": PROMPT, "stop": ["x"]}, "stop"),
        ("completions", {"prompt": [5, 2048]}, "prompt[1]"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ],
)
async def test_what_needs_a_tokenizer_is_refused(
    bare: Served, route: str, fields: dict[str, object], param: str
) -> None:
    async with bare.http() as http:
        answer = await http.post(f"/v1/{route}", json={"model": POOL} | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    if param != "prompt[1]":
        assert "without a tokenizer" in error["message"]


async def test_a_cut_stream_of_tokens_goes_on_behind_each_event(bare: Served) -> None:
    async with bare.http() as http:
        body = {**ASKED, "stream": True, "return_token_ids": True}
        async with http.stream("POST", "/v1/completions", json=body, headers={"X-Baton-Resumable": "true"}) as answer:
            whole = (await events_of(answer)).split(b"\n\n")
        path = f"/v1/streams/{answer.headers['X-Baton-Request-Id']}"
        assert len(whole) == 12 + 1 + 2  # tokens, the end of the choice, [DONE], nothing
        for seen, event in enumerate(whole[:-2], start=1):
            last = event.split(b"\n")[0].removeprefix(b"id: ").decode()
            rest = await http.get(path, headers={"Last-Event-ID": last})
            assert rest.content.split(b"\n\n") == whole[seen:]
        record = (await http.get(path.replace("streams", "requests"))).json()
    told = [token for event in whole[:-2] for token in json.loads(event.split(b"data: ")[1])["choices"][0]["token_ids"]]
    assert record["choices"][0]["token_ids"] == told
