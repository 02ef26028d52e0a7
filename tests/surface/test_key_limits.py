"""What a key may take: counts that are exact over two API processes, and slots that come back whatever ends a request."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pipeline.cli.keys import MadeKey, new_key
from pipeline.key_store import KeyStore
from pipeline.redis_server import RedisServer
from tests.serving import STREAM, Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "/v1/completions"
KILLS = 2000  # a prompt with this token id kills the engine
SHORT: dict[str, Any] = {"model": POOL, "prompt": [5, 6, 7], "max_tokens": 4}
LONG: dict[str, Any] = SHORT | {"max_tokens": 20_000, "ignore_eos": True, "stream": True}
SETTINGS = (
    "api.auth=required", "api.keys_refresh_s=0.1", "engine.mock.decode_base_ms=5", f"engine.mock.kill_token={KILLS}",
    "worker.lease_s=2", "worker.sweep_s=0.05", "worker.retry_backoff_s=0.05", "worker.max_attempts=2", "router.max_local_prefill_length=0",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(default_redis_server, tmp_path_factory.mktemp("served"), *SETTINGS) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def urls(served: Served) -> list[str]:
    """Two API processes."""
    return [served.url, await served.system.api()]


async def key(served: Served, **fields: Any) -> MadeKey:
    made = new_key("some", expires_in=None, **fields)
    await KeyStore(served.system.connection).put(made.key)
    return made


def bearer(made: MadeKey) -> dict[str, str]:
    return {"authorization": f"Bearer {made.secret}"}


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"]) if response.status_code != 200 else "ok"


async def many(urls: list[str], made: MadeKey, count: int, body: dict[str, Any]) -> list[httpx.Response]:
    """At once, over both."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, headers=bearer(made)))
            for url in urls
        ]
        return await asyncio.gather(*(clients[i % len(clients)].post(TEXT, json=body) for i in range(count)))


async def test_requests_a_minute_are_counted_exactly(served: Served, urls: list[str]) -> None:
    made = await key(served, requests_per_minute=20)
    answers = await many(urls, made, 50, SHORT)
    assert collections.Counter(map(code_of, answers)) == {"ok": 20, "rate_limit_exceeded": 30}
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
        assert 0 <= int(answer.headers["x-ratelimit-remaining-requests"]) < 20
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            assert 1 <= int(answer.headers["retry-after-ms"]) <= 120_000
            assert answer.headers["x-should-retry"] == "true"
    other = await key(served, requests_per_minute=20)
    assert collections.Counter(map(code_of, await many(urls, other, 5, SHORT))) == {"ok": 5}


async def test_tokens_a_minute_are_counted_exactly(served: Served, urls: list[str]) -> None:
    made = await key(served, tokens_per_minute=100)
    answers = await many(urls, made, 50, SHORT)  # of 3 + 4 tokens
    assert collections.Counter(map(code_of, answers)) == {"ok": 14, "rate_limit_exceeded": 36}
    assert {answer.headers["x-ratelimit-limit-tokens"] for answer in answers} == {"100"}
    assert min(int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers) == 2


async def test_every_answer_of_every_choice_counts(served: Served, urls: list[str]) -> None:
    made = await key(served, tokens_per_minute=100)
    answers = await many(urls, made, 9, SHORT | {"n": 10})  # of 3 + 10 * 4 tokens
    assert collections.Counter(map(code_of, answers)) == {"ok": 2, "rate_limit_exceeded": 7}


async def test_what_never_fits_is_said_and_not_sent_again(served: Served, urls: list[str]) -> None:
    made = await key(served, tokens_per_minute=100)
    (answer,) = await many(urls[:1], made, 1, SHORT | {"max_tokens": 98})
    assert code_of(answer) == "rate_limit_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert "101 tokens" in answer.json()["error"]["message"]
    assert code_of((await many(urls[:1], made, 1, SHORT | {"max_tokens": 97}))[0]) == "ok"


async def test_the_headers_are_on_streams_and_on_errors_too(served: Served) -> None:
    made = await key(served, requests_per_minute=10, tokens_per_minute=10_000)
    async with served.http() as http:
        for body, status in ((STREAM, 200), (SHORT | {"prompt": []}, 400), (SHORT | {"model": "nobody"}, 404)):
            path = "/v1/chat/completions" if "messages" in body else TEXT
            async with http.stream("POST", path, json=body, headers=bearer(made)) as answer:
                assert answer.status_code == status
                assert answer.headers["x-ratelimit-limit-requests"] == "10"
                assert ("x-ratelimit-limit-tokens" in answer.headers) is (status == 200)
                await events_of(answer)
        unlimited = await http.post(TEXT, json=SHORT, headers=bearer(await key(served)))
        assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


async def test_requests_at_once_are_counted_exactly(served: Served, urls: list[str]) -> None:
    made = await key(served, concurrent_requests=7)
    answers = await many(urls, made, 50, SHORT | {"max_tokens": 200, "ignore_eos": True})
    assert collections.Counter(map(code_of, answers)) == {"ok": 7, "concurrency_limit_exceeded": 43}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-should-retry"] == "true"
    assert collections.Counter(map(code_of, await many(urls, made, 7, SHORT))) == {"ok": 7}


# -- each end of a request gives its slot back ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def taken(served: Served, made: MadeKey, **more: Any) -> AsyncIterator[httpx.Response]:
    """The one slot of a key is taken by a stream that would go on for minutes."""
    async with served.http() as http, http.stream("POST", TEXT, json=LONG | more, headers=bearer(made)) as stream:
        assert stream.status_code == 200
        await served.system.until(lambda: served.system.logged(stream.headers["x-baton-request-id"], 2), 20)
        assert code_of(await http.post(TEXT, json=SHORT, headers=bearer(made))) == "concurrency_limit_exceeded"
        yield stream


async def is_free(served: Served, made: MadeKey) -> None:
    """The slot comes back, and the key's next request is taken."""
    held = served.system.keys.held(made.key.id)

    async def is_empty() -> bool:
        return await served.system.connection.command("SCARD", held) == 0

    await served.system.until(is_empty, 30)
    async with served.http() as http:
        assert code_of(await http.post(TEXT, json=SHORT, headers=bearer(made))) == "ok"


async def _cancelled(served: Served, made: MadeKey) -> None:
    async with taken(served, made) as stream, served.http() as http:
        request_id = stream.headers["x-baton-request-id"]
        await http.post(f"/v1/requests/{request_id}/cancel", headers=bearer(made))
        await events_of(stream)


async def _left(served: Served, made: MadeKey) -> None:
    async with taken(served, made):
        pass


async def _past_its_deadline(served: Served, made: MadeKey) -> None:
    async with served.http() as http:
        answer = await http.post(
            TEXT, json=LONG | {"stream": False}, headers=bearer(made) | {"x-request-timeout": "0.5"}
        )
        assert answer.status_code == 504


async def _dead_lettered(served: Served, made: MadeKey) -> None:
    async with served.http() as http:
        answer = await http.post(TEXT, json=SHORT | {"prompt": [5, KILLS]}, headers=bearer(made))
        assert answer.status_code == 500
        assert "given up" in answer.json()["error"]["message"]


async def test_more_prompts_than_the_key_may_have_at_once_are_told_that_they_never_fit(served: Served) -> None:
    made = await key(served, concurrent_requests=2)
    async with served.http() as http:
        fits = await http.post(TEXT, json=SHORT | {"prompt": ["a", "b"]}, headers=bearer(made))
        assert fits.status_code == 200
        answer = await http.post(TEXT, json=SHORT | {"prompt": ["a", "b", "c"]}, headers=bearer(made))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt"
    assert error["message"].startswith("3 prompts are 3 requests at once, and the key may have 2")
    await is_free(served, made)


@pytest.mark.faults
@pytest.mark.parametrize("end", [_cancelled, _left, _past_its_deadline, _dead_lettered], ids=lambda e: e.__name__[1:])
async def test_a_slot_comes_back(served: Served, end: Callable[[Served, MadeKey], Awaitable[None]]) -> None:
    made = await key(served, concurrent_requests=1)
    await end(served, made)
    await is_free(served, made)


@pytest.mark.faults
async def test_a_slot_is_kept_while_a_worker_dies_and_comes_back_after(served: Served) -> None:
    made = await key(served, concurrent_requests=1)
    async with served.http() as http, asyncio.timeout(90):
        async with taken(served, made, max_tokens=400) as stream:
            decode = next(p for p in served.system.processes if "decode" in p.args and p.poll() is None)  # type: ignore[operator]
            decode.kill()
            await asyncio.to_thread(decode.wait)
            assert code_of(await http.post(TEXT, json=SHORT, headers=bearer(made))) == "concurrency_limit_exceeded"
            await served.system.worker("decode")
            assert (await events_of(stream)).endswith(b"data: [DONE]\n\n")
    await is_free(served, made)


async def test_everything_rests(served: Served, urls: list[str]) -> None:
    await served.system.until(served.rests, 30)
    assert "Traceback" not in served.api_log()
