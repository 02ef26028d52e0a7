"""`/openapi.json` of a running server: it is open, and every example on it gets the answer that it claims."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.openapi.examples import BATCH_ID, FILE_ID, ID
from pipeline.api_keys import digest_of
from pipeline.redis_server import RedisServer
from tests.openapi_page import SSE, Page, events_in
from tests.serving import serving
from tests.system import POOL

TORCH = (f"pools.{POOL}.engine=torch", f"pools.{POOL}.embeddings=true")
UNKNOWN = {"{file_id}": FILE_ID, "{batch_id}": BATCH_ID}
OWN = re.compile(rf"{POOL}-[\w-]{{22}}$")


async def test_every_example_gets_the_answer_that_it_claims(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        serving(default_redis_server, tmp_path, *TORCH, stages="prefill decode embed") as served,
        served.http() as http,
    ):
        page = Page((await http.get("/openapi.json")).json())
        ids: dict[str, str] = {}
        for path, method, name, example in page.examples():
            response = await http.request(method, path, json=example["value"])
            check(page, path, method, response)
            assert response.status_code == example["x-status"], f"{path}: {name}: {response.text[:300]}"
            assert is_stream(response) == bool(example["value"].get("stream")), f"{path}: {name}"
            if (shown := page.shown(path, method, response.status_code, name)) is not None:
                assert without_labels(response.json()) == without_labels(shown), f"{path}: {name}"
            ids[path] = response.headers.get("x-baton-request-id", ids.get(path, ""))
        await follow(page, http, ids)


async def follow(page: Page, http: httpx.AsyncClient, ids: dict[str, str]) -> None:
    """What the page says of paths without a body, and of those with an id: of one that is known and of the one on the page."""
    texts, responses = (
        [ids["/v1/chat/completions"], ids["/v1/completions"], ids["/v1/messages"]],
        [ids["/v1/responses"]],
    )
    file_id = await a_file(page, http)
    known = {
        "{request_id}": [*texts, *responses],
        "{response_id}": responses,
        "{file_id}": [file_id],
        "{batch_id}": [await a_batch(page, http, file_id)],
        "{model}": [POOL],
        "{pool}": [POOL],
    }
    told = [(path, method) for path, method, operation in page.operations() if "requestBody" not in operation]
    for path, method in sorted(told, key=lambda one: one[1] == "delete"):
        name = next((name for name in known if name in path), None)
        for one in known[name] if name else [""]:
            if path.startswith("/v1/streams") and one in responses:
                continue
            response = await http.request(method, path.replace(name or " ", one))
            check(page, path, method, response)
            is_foreground = path.endswith("/cancel") and one in responses and "responses" in path
            assert response.status_code == (400 if is_foreground else 200), response.text[:300]
        if name and name not in ("{model}", "{pool}"):
            response = await http.request(method, path.replace(name, UNKNOWN.get(name, ID)))
            check(page, path, method, response)
            assert response.status_code == 404
            assert method == "head" or response.json() == page.shown(path, method, 404, "unknown")


async def a_file(page: Page, http: httpx.AsyncClient) -> str:
    """The id of one, of which the page says how it is made and read in parts."""
    path = "/v1/files"
    made = await http.post(path, data={"purpose": "batch"}, files={"file": ("a.jsonl", b"0123456789")})
    check(page, path, "post", made)
    for part, status in (("bytes=2-4", 206), ("bytes=99-", 416)):
        read = await http.get(f"{path}/{made.json()['id']}/content", headers={"range": part})
        check(page, f"{path}/{{file_id}}/content", "get", read)
        assert read.status_code == status
    return str(made.json()["id"])


async def a_batch(page: Page, http: httpx.AsyncClient, file_id: str) -> str:
    """The id of one, which nobody runs."""
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"}
    made = await http.post("/v1/batches", json=body)
    check(page, "/v1/batches", "post", made)
    return str(made.json()["id"])


async def test_the_page_is_open_and_says_whether_a_key_is_needed(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[team]\ndigest = "{digest_of("baton-sk-none")}"\n')
    async with (
        serving(default_redis_server, tmp_path, f"api.keys_file={keys}", stages="decode") as served,
        served.http() as http,
    ):
        page = (await http.get("/openapi.json")).json()
        assert page["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}, {"x-api-key": []}]
        for path, method, operation in Page(page).operations():
            response = await http.request(method, path, json={} if method == "post" else None)
            assert (response.status_code == 401) == bool(operation["security"]), f"{method} {path}"
            check(Page(page), path, method, response)


def check(page: Page, path: str, method: str, response: httpx.Response) -> None:
    page.check(path, method, response.status_code, response.headers, response.content)
    if is_stream(response) and method != "head":
        assert list(events_in(response.content))


def is_stream(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith(SSE)


def without_labels(value: Any) -> Any:
    """Without what is another each time."""
    if isinstance(value, list):
        return [without_labels(one) for one in value]
    if isinstance(value, dict):
        return {name: without_labels(one) for name, one in value.items() if name not in ("id", "created", "request_id")}
    return value


@pytest.mark.parametrize("prefix", ["chatcmpl-", "msg_", "resp_", ""])
def test_the_id_of_the_page_looks_like_one(prefix: str) -> None:
    assert OWN.search(prefix + ID)
