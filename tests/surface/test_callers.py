"""API keys against running servers: who gets in, to what, and whose requests are whose."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from pipeline.cli.keys import MadeKey, new_key
from pipeline.key_store import KeyStore
from pipeline.redis_server import RedisServer
from tests.serving import STREAM, Served, events_of, serving
from tests.system import POOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPOSITORY = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
HELLO = {"model": POOL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PAGE = "https://page.example"
SETTINGS = ("api.auth=required", "api.keys_refresh_s=0.1", f"api.cors_origins={PAGE}", "engine.mock.decode_base_ms=5")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(default_redis_server, tmp_path_factory.mktemp("served"), *SETTINGS) as served:
        yield served


async def key(served: Served, name: str = "some", **fields: Any) -> MadeKey:
    """A new key in Redis."""
    made = new_key(name, expires_in=None, **fields)
    await KeyStore(served.system.connection).put(made.key)
    return made


async def change(served: Served, made: MadeKey, **fields: Any) -> None:
    await KeyStore(served.system.connection).put(msgspec.structs.replace(made.key, **fields))


def bearer(made: MadeKey) -> dict[str, str]:
    return {"authorization": f"Bearer {made.secret}"}


async def is_refused(http: httpx.AsyncClient, headers: dict[str, str]) -> bool:
    return (await http.get("/v1/models", headers=headers)).status_code == 401


def error_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response.status_code, error["code"]


async def test_who_shows_no_valid_key_is_told_the_same_whatever_is_wrong(served: Served) -> None:
    revoked = await key(served, "revoked")
    await change(served, revoked, revoked_s=1)
    expired = await key(served, "expired")
    await change(served, expired, expires_s=1)
    valid = await key(served)
    shown: list[dict[str, str]] = [
        {}, {"authorization": "Bearer"}, {"authorization": "Basic abc"}, {"authorization": valid.secret},
        {"authorization": "Bearer none"}, {"x-api-key": "none"}, {"authorization": f"Bearer {valid.key.digest}"},
        {"authorization": f"Bearer {valid.secret[:-1]}"}, bearer(revoked), bearer(expired),
        {"authorization": "Bearer none", "x-api-key": valid.secret},
    ]  # fmt: skip
    async with served.http() as http:
        for headers in shown:
            response = await http.post(CHAT, json=HELLO, headers=headers)
            assert error_of(response) == (401, "invalid_api_key"), headers
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-should-retry"] == "false"
            assert valid.secret not in response.text
        for headers in (bearer(valid), {"authorization": f"bearer {valid.secret}"}, {"x-api-key": valid.secret}):
            assert (await http.post(CHAT, json=HELLO, headers=headers)).status_code == 200


async def test_everything_but_the_probes_needs_a_key(served: Served) -> None:
    valid = await key(served)
    async with served.http() as http:
        for path in ("/live", "/ready", "/health", "/version"):
            assert (await http.get(path)).status_code == 200
        for method, path in (
            ("GET", "/v1/models"), ("GET", f"/v1/models/{POOL}"), ("GET", "/metrics"), ("POST", "/v1/completions"),
            ("GET", "/v1/requests/x"), ("GET", "/v1/streams/x"), ("POST", "/v1/requests/x/cancel"), ("GET", "/"),
            ("GET", "/docs"), ("GET", "/v1/anything"), ("GET", "//live"), ("GET", "/live/"), ("DELETE", "/live/../v1/models"),
        ):  # fmt: skip
            assert error_of(await http.request(method, path)) == (401, "invalid_api_key"), path
        assert (await http.get("/metrics", headers=bearer(valid))).status_code == 200
        assert (await http.options(CHAT)).status_code == 204


async def test_a_body_of_a_stranger_is_not_read(served: Served) -> None:
    async with served.http() as http:
        response = await http.post(CHAT, content=b"x" * 50_000_000, headers={"content-type": "application/json"})
        assert error_of(response) == (401, "invalid_api_key")


async def test_models_that_a_key_may_use(served: Served) -> None:
    other, this = await key(served, "other", models=["other"]), await key(served, "this", models=[POOL])
    async with served.http() as http:
        assert error_of(await http.post(CHAT, json=HELLO, headers=bearer(other))) == (403, "permission_denied")
        assert error_of(await http.get(f"/v1/models/{POOL}", headers=bearer(other))) == (403, "permission_denied")
        assert (await http.get("/v1/models", headers=bearer(other))).json()["data"] == []
        assert (await http.post(CHAT, json=HELLO, headers=bearer(this))).status_code == 200
        assert [model["id"] for model in (await http.get("/v1/models", headers=bearer(this))).json()["data"]] == [POOL]
        unknown = await http.post(CHAT, json=HELLO | {"model": "nobody"}, headers=bearer(this))
        assert error_of(unknown) == (403, "permission_denied")


async def test_a_key_for_administration_makes_no_text(served: Served) -> None:
    admin = await key(served, "admin", scopes=["admin"])
    async with served.http() as http:
        for response in (
            await http.post(CHAT, json=HELLO, headers=bearer(admin)),
            await http.get("/v1/models", headers=bearer(admin)),
        ):
            assert error_of(response) == (403, "permission_denied")
        assert (await http.get("/metrics", headers=bearer(admin))).status_code == 200
        assert (await http.get("/v1/scaling/baton-tiny", headers=bearer(admin))).status_code == 200


async def test_requests_of_one_key_are_not_there_for_another(served: Served) -> None:
    mine, yours, admin = [await key(served, name) for name in ("mine", "yours")] + [
        await key(served, "boss", scopes=["admin"])
    ]
    async with served.http() as http, asyncio.timeout(60):
        body = STREAM | {"max_tokens": 4000}
        async with http.stream("POST", CHAT, json=body, headers=bearer(mine)) as stream:
            request_id = stream.headers["x-baton-request-id"]
            for headers in (bearer(yours), bearer(admin)):
                for path in (f"/v1/requests/{request_id}", f"/v1/streams/{request_id}"):
                    assert error_of(await http.get(path, headers=headers)) == (404, "request_not_found")
            cancel = f"/v1/requests/{request_id}/cancel"
            assert error_of(await http.post(cancel, headers=bearer(yours))) == (404, "request_not_found")
            seen = await http.get(f"/v1/requests/{request_id}", headers=bearer(mine))
            assert seen.json()["state"] == "running"
            told = (await http.post(cancel, headers=bearer(admin))).json()
            assert (told["state"], told["reason"]) == ("cancelled", "cancelled by an administrator")
            await events_of(stream)


async def test_an_idempotency_key_is_its_keys_own(served: Served) -> None:
    mine, yours = await key(served, "mine"), await key(served, "yours")
    async with served.http() as http:
        ids = [
            (await http.post(CHAT, json=HELLO, headers=bearer(each) | {"idempotency-key": "same"})).json()["id"]
            for each in (mine, mine, yours)
        ]
    assert ids[0] == ids[1] != ids[2]


async def test_a_revoked_key_is_refused_soon_and_what_it_runs_goes_on(served: Served) -> None:
    made = await key(served)
    async with served.http() as http, asyncio.timeout(60):
        async with http.stream(
            "POST", CHAT, json=STREAM | {"max_tokens": 200, "ignore_eos": True}, headers=bearer(made)
        ) as stream:
            await change(served, made, revoked_s=int(time.time()))
            await served.system.until(lambda: is_refused(http, bearer(made)), 20)
            assert error_of(await http.post(CHAT, json=HELLO, headers=bearer(made))) == (401, "invalid_api_key")
            assert (await events_of(stream)).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("fields", "asked", "lane", "tier"),
    [
        ({}, {}, "default", None),
        ({"lane": "low"}, {}, "low", None),
        ({"lane": "low"}, {"service_tier": "auto"}, "low", "flex"),
        ({"lane": "low"}, {"service_tier": "priority"}, "high", "priority"),
        ({"lane": "low", "best_lane": "default"}, {"service_tier": "priority"}, "default", "default"),
        ({"best_lane": "low"}, {"priority": -5}, "low", None),
        ({"lane": "high"}, {"priority": 0}, "default", None),
    ],
)
async def test_the_lane_of_a_key(
    served: Served, fields: dict[str, str], asked: dict[str, Any], lane: str, tier: str | None
) -> None:
    made = await key(served, **fields)
    async with served.http() as http:
        answer = await http.post(CHAT, json=HELLO | asked, headers=bearer(made))
        assert answer.json().get("service_tier") == tier
        request = await http.get(f"/v1/requests/{answer.headers['x-baton-request-id']}", headers=bearer(made))
        assert request.json()["lane"] == lane


async def test_the_official_client(served: Served) -> None:
    made = await key(served, requests_per_minute=2)
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=made.secret, max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(**HELLO)
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert [part async for part in await client.chat.completions.create(**HELLO, stream=True)]
        with pytest.raises(openai.RateLimitError) as limited:
            await client.chat.completions.create(**HELLO)
        assert limited.value.code == "rate_limit_exceeded"
        assert [model.id for model in (await client.models.list()).data] == [POOL]
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(**HELLO)


async def test_pages_that_were_named_may_call_from_a_browser(served: Served) -> None:
    made = await key(served)
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    async with served.http() as http:
        preflight = await http.options(CHAT, headers=asks | {"origin": PAGE})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        other = await http.options(CHAT, headers=asks | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        for headers, status in ((bearer(made), 200), ({}, 401)):
            async with http.stream("POST", CHAT, json=STREAM, headers=headers | {"origin": PAGE}) as answer:
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == PAGE
                exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
                assert {"x-request-id", "x-baton-request-id", "x-ratelimit-remaining-tokens", "retry-after"} <= {
                    *exposed
                }
                await events_of(answer)


def baton(redis_url: str, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    command = [sys.executable, "-m", "pipeline.cli", *words, "--set", f"redis.url={redis_url}"]
    return subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=60)


def ask(served: Served, secret: str) -> subprocess.CompletedProcess[str]:
    """`baton chat` with a key."""
    words = ["chat", "hi", "--max-tokens", "4", "--url", served.url]
    command = [sys.executable, "-m", "pipeline.cli", *words]
    env = os.environ | {"BATON_API_KEY": secret}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)


async def test_keys_are_made_listed_and_revoked_on_the_command_line(served: Served) -> None:
    url = served.system.settings.redis.url
    created = baton(
        url, "keys", "create", "team-a", "--model", POOL, "--concurrent-requests", "2", "--expires-in", "1d"
    )
    secret = created.stdout.strip()
    assert (created.returncode, created.stdout) == (0, f"{secret}\n")
    assert baton(url, "keys", "create", "team-a").returncode == 2
    async with served.http() as http:
        headers = {"authorization": f"Bearer {secret}"}
        assert (await http.post(CHAT, json=HELLO, headers=headers)).status_code == 200
        assert ask(served, secret).returncode == 0
        listed = baton(url, "keys", "list", "--json")
        (row,) = [row for row in json.loads(listed.stdout) if row["name"] == "team-a"]
        assert (row["state"], row["models"], row["concurrent_requests"]) == ("valid", [POOL], 2)
        assert secret not in listed.stdout
        assert "team-a" in baton(url, "keys", "list").stdout
        assert baton(url, "keys", "revoke", "nobody").returncode == 1
        assert baton(url, "keys", "revoke", row["id"]).returncode == 0
        await served.system.until(lambda: is_refused(http, headers), 20)
        assert ask(served, secret).returncode == 1
    again = json.loads(baton(url, "keys", "create", "team-a", "--json").stdout)
    assert again["key"] != secret
    assert baton(url, "keys", "revoke", "team-a", "--json").returncode == 0


@pytest.mark.parametrize(("secret", "why"), [("", "holds none"), ("wrong", "is not valid there")])
async def test_baton_chat_says_where_it_takes_the_key_from(served: Served, secret: str, why: str) -> None:
    refused = await asyncio.to_thread(ask, served, secret)
    assert refused.returncode == 1
    assert f"the API needs a key, and BATON_API_KEY {why}: set the variable BATON_API_KEY" in refused.stderr
    assert "baton keys create" in refused.stderr


async def test_no_secret_is_in_a_log(served: Served) -> None:
    made = await key(served)
    async with served.http() as http:
        assert (await http.post(CHAT, json=HELLO, headers=bearer(made))).status_code == 200
        await http.post(CHAT, json=HELLO, headers={"authorization": "Bearer baton-sk-not-a-key-of-ours"})
    logs = "".join(path.read_text() for path in served.log_dir.iterdir())
    assert made.secret not in logs
    assert "not-a-key-of-ours" not in logs
    assert "Traceback" not in logs


async def test_everything_rests(served: Served) -> None:
    await served.system.until(served.rests, 20)
