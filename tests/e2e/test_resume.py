"""A stream that was cut goes on exactly there: after every event, on another replica, while it runs and after its end."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio

from pipeline.redis_server import RedisServer
from tests.serving import Served, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESUMABLE = {"X-Baton-Resumable": "true"}
HELLO = [{"role": "user", "content": "Tell me something."}]
USAGE = {"stream_options": {"include_usage": True}}


class Event(NamedTuple):
    """One event: its id where it has one, and its data."""

    id: str | None
    data: bytes

    @property
    def choice(self) -> int | None:
        """The choice that it belongs to; None for the usage and the end."""
        if not self.data.startswith(b"{"):
            return None
        choices = json.loads(self.data).get("choices")
        return choices[0]["index"] if choices else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    async with serving(default_redis_server, folder, "engine.mock.decode_base_ms=4", "api.ping_s=0.05") as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(served: Served) -> str:
    """Another replica."""
    return await served.system.api()


def events(data: bytes) -> list[Event]:
    """Whole events; each is an id, if it has one, and data, and nothing else."""
    found = []
    for block in data.replace(b": ping\n", b"").split(b"\n\n")[:-1]:
        *head, last = block.split(b"\n")
        assert len(head) <= 1
        assert all(line.startswith(b"id: ") for line in head)
        assert last.startswith(b"data: ")
        found.append(Event(head[0][4:].decode() if head else None, last[6:]))
    return found


def by_choice(found: list[Event]) -> dict[int | None, list[bytes]]:
    """The data in the order in which it came, choice by choice; what belongs to none at last."""
    sorted_out: dict[int | None, list[bytes]] = {}
    for event in found:
        sorted_out.setdefault(event.choice, []).append(event.data)
    return sorted_out


def last_id(found: list[Event]) -> str | None:
    return next((event.id for event in reversed(found) if event.id is not None), None)


async def resume(url: str, request_id: str, last_event_id: str | None = None) -> list[Event]:
    """What a reader gets that had the events up to this id."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id is not None else {}
    async with httpx.AsyncClient(timeout=60) as http:
        response = await http.get(f"{url}/v1/streams/{request_id}", headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["x-baton-request-id"] == request_id
        return events(response.content)


async def read_until(url: str, path: str, body: dict[str, Any], count: int) -> tuple[str, list[Event]]:
    """Read so many events of a resumable stream, then cut the connection; all of it when there are not as many."""
    data = b""
    async with httpx.AsyncClient(timeout=60) as http:
        async with http.stream("POST", url + path, json=body, headers=RESUMABLE) as response:
            assert response.status_code == 200
            async for part in response.aiter_raw():
                data += part
                if len(events(data)) >= count:
                    break
            return response.headers["x-baton-request-id"], events(data)[:count]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": POOL, "messages": HELLO, "stream": True, "max_tokens": 14} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"model": POOL, "prompt": "Once upon a time", "stream": True, "max_tokens": 14} | fields


async def stop_string(served: Served, path: str, body: dict[str, Any]) -> str:
    """Two characters that come up in the middle of the first choice's text."""
    plain = {name: value for name, value in body.items() if name != "stream_options"}
    async with served.http() as http:
        answer = (await http.post(path, json=plain | {"stream": False})).json()["choices"][0]
    said = answer["message"]["content"] if path == CHAT else answer["text"]
    half = len(said) // 2
    return str(said[half : half + 2])


CASES = [
    pytest.param(CHAT, chat(temperature=0, **USAGE), False, id="chat"),
    pytest.param(CHAT, chat(n=3, temperature=1.0, seed=5), False, id="chat, 3 choices"),
    pytest.param(CHAT, chat(n=3, temperature=1.0, seed=5, **USAGE), True, id="chat, 3 choices, stop string"),
    pytest.param(TEXT, text(temperature=1.0, seed=8), True, id="completion, stop string"),
    pytest.param(TEXT, text(n=3, temperature=1.0, seed=9, **USAGE), False, id="completion, 3 choices"),
]


@pytest.mark.parametrize(("path", "body", "stops"), CASES)
async def test_a_stream_cut_after_any_event_goes_on_there_on_another_replica(
    served: Served, other: str, path: str, body: dict[str, Any], stops: bool
) -> None:
    if stops:
        body = body | {"stop": [await stop_string(served, path, body)]}
    request_id, uncut = await read_until(served.url, path, body, 10_000)
    assert uncut[-1] == Event(None, b"[DONE]")
    assert all(event.id for event in uncut[:-1])
    assert len({event.id for event in uncut}) == len(uncut)
    for seen in range(1, len(uncut) + 1):
        tail = await resume(other, request_id, last_id(uncut[:seen]))
        if seen == len(uncut):  # everything, so only the end comes again
            assert tail == uncut[-1:]
        else:
            assert by_choice(uncut[:seen] + tail) == by_choice(uncut), f"cut after {uncut[seen - 1]}"
            assert last_id(uncut[:seen] + tail) == last_id(uncut)
    whole = await resume(other, request_id)
    assert by_choice(whole) == by_choice(uncut)


@pytest.mark.parametrize(("path", "body", "stops"), CASES)
async def test_a_running_stream_cut_after_any_event_goes_on_there(
    served: Served, other: str, path: str, body: dict[str, Any], stops: bool
) -> None:
    if stops:
        body = body | {"stop": [await stop_string(served, path, body)]}
    _, uncut = await read_until(served.url, path, body, 10_000)

    async def cut(after: int) -> None:
        request_id, seen = await read_until(served.url, path, body, after)
        tail = await resume(other, request_id, last_id(seen))
        whole = await resume(served.url, request_id)
        assert by_choice(seen + tail) == by_choice(whole)
        assert len(whole) == len(uncut)

    await asyncio.gather(*(cut(after) for after in range(1, len(uncut))))


async def test_the_streams_have_what_is_hard_to_cut(served: Served) -> None:
    """The cases above mean something only if text is held back in them and comes with the end."""
    body = text(temperature=1.0, seed=8, max_tokens=60)
    ids = [event.id for event in (await read_until(served.url, TEXT, body, 10_000))[1] if event.id]
    marks = [int(name.rstrip("te")) for name in ids]
    assert any(after - before > 1 for before, after in itertools.pairwise(marks)), "no torn character"
    assert [name[-1] for name in ids[-2:]] == ["t", "e"]
