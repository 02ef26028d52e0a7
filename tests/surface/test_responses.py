"""Responses through the official client, against a running system with the built-in model: every body and event is of OpenAI's types."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseItemList

from pipeline.redis_server import RedisServer
from tests.openai_types import events_in, strictly
from tests.serving import Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED: dict[str, Any] = {"model": POOL, "input": "Tell me a story.", "temperature": 0, "max_output_tokens": 40}
LONG: dict[str, Any] = {**ASKED, "max_output_tokens": 1500}
TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["torch", "mock"])
async def served(
    request: pytest.FixtureRequest, default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    settings = (f"pools.{POOL}.engine={request.param}", "engine.mock.decode_base_ms=4")
    async with serving(default_redis_server, folder, *settings) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served.openai() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with served.http() as http:
        yield http


async def made(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/responses", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    strictly(Response, answer.json())
    return dict(answer.json())


async def stream_of(http: httpx.AsyncClient, **fields: Any) -> bytes:
    async with http.stream("POST", "/v1/responses", json={**ASKED, "stream": True, **fields}) as answer:
        assert answer.status_code == 200
        return await events_of(answer)


async def replay(http: httpx.AsyncClient, response_id: str, after: int = -1) -> bytes:
    query = {"stream": "true", **({"starting_after": str(after)} if after >= 0 else {})}
    async with http.stream("GET", f"/v1/responses/{response_id}", params=query) as answer:
        assert answer.status_code == 200
        return await events_of(answer)


async def settled(client: openai.AsyncOpenAI, response_id: str) -> Response:
    async with asyncio.timeout(60):
        async for _ in await client.responses.retrieve(response_id, stream=True):
            pass
    return await client.responses.retrieve(response_id)


async def test_a_response_is_whole_streamed_and_retrieved_the_same(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    fields: Any = {"metadata": {"a": "b"}, "instructions": "Be brief.", "user": "u"}
    whole = await made(http, **fields)
    assert whole["id"].startswith(f"resp_{POOL}-")
    assert (whole["metadata"], whole["instructions"], whole["user"]) == ({"a": "b"}, "Be brief.", "u")
    again = (await http.get(f"/v1/responses/{whole['id']}")).json()
    assert again == whole
    events = events_in(await stream_of(http, **fields))
    told = events[-1]["response"]
    assert "".join(event["delta"] for event in events if "delta" in event) == told["output"][0]["content"][0]["text"]
    assert told["output"][0]["content"] == whole["output"][0]["content"]
    by_client = await client.responses.create(**ASKED, **fields)
    assert by_client.output_text == whole["output"][0]["content"][0]["text"] != ""
    assert by_client.usage is not None and by_client.usage.output_tokens <= 40


async def test_the_clients_helper_reads_a_stream(client: openai.AsyncOpenAI) -> None:
    kinds: list[str] = []
    text = ""
    async with client.responses.stream(**ASKED) as stream:
        async for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
                assert event.snapshot == text
            elif event.type == "response.output_text.done":
                assert event.text == text != ""
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-1] in ("response.completed", "response.incomplete")


async def test_an_answer_that_was_cut_is_incomplete(http: httpx.AsyncClient) -> None:
    whole = await made(http, max_output_tokens=3, ignore_eos=True)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert whole["usage"]["output_tokens"] == 3


async def test_the_background_answers_at_once_and_goes_on(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    queued = await made(http, background=True)
    assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
    response = await settled(client, queued["id"])
    assert response.output_text == (await client.responses.create(**ASKED)).output_text
    assert response.status in ("completed", "incomplete")


async def test_a_background_stream_goes_on_behind_any_event(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, served: Served
) -> None:
    seen: list[Any] = []
    stream: Any = await client.responses.create(**LONG, background=True, stream=True)
    async for event in stream:
        seen.append(event)
        if len(seen) == 12:
            break
    await stream.close()
    response_id = seen[0].response.id
    rest: Any = await client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
    seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type in ("response.completed", "response.incomplete")
    whole = await replay(http, response_id)
    events = events_in(whole)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["type"] for event in events] == [event.type for event in seen]
    for after in (0, 1, len(events) // 2, len(events) - 2, len(events) - 1, len(events) + 5):
        rest = b"".join(part + b"\n\n" for part in whole.split(b"\n\n")[:-1][after + 1 :])
        assert await replay(http, response_id, after) == rest


async def test_a_live_stream_is_its_replay(http: httpx.AsyncClient) -> None:
    live = await stream_of(http)
    assert await replay(http, events_in(live)[0]["response"]["id"]) == live


async def test_the_background_is_cancelled(client: openai.AsyncOpenAI, http: httpx.AsyncClient, served: Served) -> None:
    response = await client.responses.create(**LONG, background=True, extra_body={"ignore_eos": True})
    cancelled = await client.responses.cancel(response.id)
    assert (cancelled.status, cancelled.error) == ("cancelled", None)
    assert (await client.responses.cancel(response.id)).status == "cancelled"
    strictly(Response, (await http.get(f"/v1/responses/{response.id}")).json())
    last = events_in(await replay(http, response.id))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
    with pytest.raises(openai.BadRequestError, match="only a response of the background"):
        await client.responses.cancel((await client.responses.create(**ASKED)).id)


async def test_a_reader_hears_of_a_cancel(client: openai.AsyncOpenAI) -> None:
    stream: Any = await client.responses.create(**LONG, background=True, stream=True, extra_body={"ignore_eos": True})
    events = [await anext(stream)]
    await client.responses.cancel(events[0].response.id)
    events += [event async for event in stream]
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "cancelled")


async def test_a_conversation_goes_on_even_when_its_beginning_is_gone(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    first = await client.responses.create(**ASKED)
    second = await client.responses.create(**ASKED | {"input": "And then?"}, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    by_hand: Any = [
        {"role": "user", "content": ASKED["input"]},
        *first.output,
        {"role": "user", "content": "And then?"},
    ]
    items = [item if isinstance(item, dict) else item.model_dump() for item in by_hand]
    assert (await client.responses.create(**ASKED | {"input": items})).output_text == second.output_text
    await client.responses.delete(first.id)
    third = await made(http, input="And in the end?", previous_response_id=second.id)
    listed = (await http.get(f"/v1/responses/{third['id']}/input_items", params={"order": "asc"})).json()
    strictly(ResponseItemList, listed)
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == [ASKED["input"], first.output_text, "And then?", second.output_text, "And in the end?"]
    by_client = [item async for item in client.responses.input_items.list(third["id"], limit=2)]
    assert [item.id for item in by_client] == [item["id"] for item in reversed(listed["data"])]
    assert (third["usage"]["input_tokens"]) > second.usage.input_tokens  # type: ignore[union-attr]


async def test_what_cannot_be_gone_on_from_is_said(client: openai.AsyncOpenAI) -> None:
    running = await client.responses.create(**LONG, background=True, extra_body={"ignore_eos": True})
    with pytest.raises(openai.BadRequestError, match="only one that is complete") as early:
        await client.responses.create(**ASKED, previous_response_id=running.id)
    assert early.value.param == "previous_response_id"
    await client.responses.cancel(running.id)
    for gone in (running.id[:-1] + "x", "resp_nowhere"):
        with pytest.raises(openai.BadRequestError) as missing:
            await client.responses.create(**ASKED, previous_response_id=gone)
        assert (missing.value.code, missing.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_deleted_response_is_gone_with_its_log(client: openai.AsyncOpenAI, served: Served) -> None:
    response = await client.responses.create(**ASKED)
    await client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await call(response.id)
    bare = response.id.removeprefix("resp_")
    keys = served.system.keys
    assert not await served.system.connection.command("EXISTS", keys.log(bare, 0))
    assert await served.system.connection.command("HGET", keys.request(bare), "body") is None


async def test_a_running_response_is_cancelled_before_it_is_deleted(client: openai.AsyncOpenAI, served: Served) -> None:
    """Its reader hears of it, and nobody brings it back."""
    stream: Any = await client.responses.create(**LONG, background=True, stream=True, extra_body={"ignore_eos": True})
    first = await anext(stream)
    await client.responses.delete(first.response.id)
    last = [event async for event in stream][-1]
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.response.id)
    await served.system.until(served.rests, 10)


async def test_what_is_not_stored_is_not_retrieved(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(**ASKED, previous_response_id=response.id)


async def test_a_chat_is_no_response(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    chat = await client.chat.completions.create(model=POOL, messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(chat.id)
    response = await client.responses.create(**ASKED)
    answer = await http.get(f"/v1/streams/{response.id}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


async def test_tools_are_listed_and_a_call_of_one_is_answered(http: httpx.AsyncClient) -> None:
    items = [
        {"role": "user", "content": "What is it?"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
    ]
    whole = await made(http, input=items, tools=[TOOL], tool_choice="none")
    assert whole["tools"] == [{**TOOL, "description": None}]
    assert whole["tool_choice"] == "none"


async def test_a_key_stands_for_one_response(client: openai.AsyncOpenAI) -> None:
    keyed: Any = {"extra_headers": {"Idempotency-Key": "once"}}
    first = await client.responses.create(**ASKED, background=True, **keyed)
    second = await client.responses.create(**ASKED, background=True, **keyed)
    assert first.id == second.id
    with pytest.raises(openai.ConflictError):
        await client.responses.create(**ASKED | {"input": "other"}, background=True, **keyed)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=maybe", "stream"), ("?starting_after=3", "starting_after"), ("?stream=true&starting_after=-1", "starting_after"),
        ("/input_items?limit=0", "limit"), ("/input_items?order=up", "order"), ("/input_items?after=x", "after"),
    ],
)  # fmt: skip
async def test_a_query_that_means_nothing_is_named(http: httpx.AsyncClient, path: str, param: str) -> None:
    response = await made(http, max_output_tokens=1)
    answer = await http.get(f"/v1/responses/{response['id']}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_errors_are_the_clients_own_kinds(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.responses.create(model="gpt-unknown", input="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        await client.responses.create(**ASKED | {"max_output_tokens": 1_000_000})
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")


async def test_nothing_is_left(served: Served) -> None:
    await served.system.until(served.rests, 10)
    assert "Traceback" not in served.api_log()
