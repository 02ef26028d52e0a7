"""Files that are no batches, by OpenAI's client: each bad line is told, nothing runs, and nothing is left of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from pipeline.redis_server import RedisServer
from tests.batches.running import Batching, batching, chat_line, text_line
from tests.openai_types import strictly

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 2**20
SETTINGS = ("batches.max_lines=20", f"batches.max_bytes={11 * MIB}", f"batches.max_line_bytes={MIB}")
GOOD = text_line("good")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Batching]:
    async with batching(default_redis_server, tmp_path_factory.mktemp("malformed"), *SETTINGS) as it:
        yield it


def packed(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode()


def with_url(url: str) -> dict[str, Any]:
    return text_line("other") | {"url": url}


BOMB = gzip.compress(b"\x00" * 100 * MIB)
CASES: dict[str, tuple[list[bytes | dict[str, Any]], list[tuple[int | None, str]]]] = {
    "an empty file": ([b"\n"], [(None, "empty_file")]),
    "a mark and blank lines": ([b"\xef\xbb\xbf\r\n\r\n  "], [(None, "empty_file")]),
    "not JSON": ([GOOD, b"custom_id,url\n"], [(2, "invalid_json_line")]),
    "pretty JSON": (
        [json.dumps({"custom_id": "a"}, indent=1).encode()],
        [(1, "invalid_json_line"), (2, "invalid_line"), (3, "invalid_json_line")],
    ),
    "a list": ([b"[" + packed(GOOD) + b"]"], [(1, "invalid_line")]),
    "duplicate ids": ([GOOD, text_line("b"), b"\n", GOOD, GOOD], [(4, "duplicate_custom_id"), (5, "duplicate_custom_id")]),
    "mixed urls": ([GOOD, chat_line("chat")], [(2, "mismatched_url")]),
    "a url that is none": ([with_url("http://127.0.0.1/v1/completions")], [(1, "mismatched_url")]),
    "stream": ([text_line("a", stream=True), GOOD], [(1, "invalid_request")]),
    "invalid UTF-8": ([GOOD, packed(text_line("b", prompt="~")).replace(b"~", b"\xff") + b"\n"], [(2, "invalid_request")]),
    "latin-1": ([packed(text_line("~")).replace(b"~", b"\xe9") + b"\n"], [(1, "invalid_json_line")]),
    "UTF-16": ([packed(GOOD).decode().encode("utf-16")], [(1, "invalid_file")]),
    "deep nesting": ([b'{"custom_id":"a","body":' + b"[" * 200_000 + b"\n", GOOD], [(1, "invalid_json_line")]),
    "a line of 10 MB": ([GOOD, packed(text_line("b", prompt="x" * 10 * 1_000_000)) + b"\n"], [(2, "line_too_long")]),
    "an unknown model": ([GOOD, text_line("b", model="gpt-4o-mini")], [(2, "model_not_found")]),
    "no id": ([GOOD | {"custom_id": None}], [(1, "invalid_line")]),
    "an empty id": ([GOOD | {"custom_id": ""}], [(1, "invalid_custom_id")]),
    "another method": ([GOOD | {"method": "GET"}], [(1, "invalid_method")]),
    "a wrong field": ([text_line("a", max_tokens="many")], [(1, "invalid_request")]),
    "one request too many": ([text_line(str(number)) for number in range(21)], [(21, "too_many_requests")]),
    "a gzip file": ([gzip.compress(packed(GOOD))], [(1, "invalid_file")]),
    "a zip bomb": ([BOMB], [(1, "invalid_file")]),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
async def test_a_malformed_file_fails_its_batch_and_nothing_is_left(it: Batching, what: str) -> None:
    lines, expected = CASES[what]
    made = await it.batch(lines)
    batch = await it.ended(made.id)
    strictly(Batch, batch.model_dump(mode="json", exclude_unset=True))
    assert batch.status == "failed", batch
    told = [(error.line, error.code) for error in batch.errors.data]
    assert told == expected
    assert all(0 < len(error.message) < 1000 for error in batch.errors.data)
    assert batch.output_file_id is batch.error_file_id is None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.failed_at is not None) == (0, 0, True)
    await nothing_is_left(it, made)


async def nothing_is_left(it: Batching, batch: Any) -> None:
    """Beside the batch that failed, and its input."""
    assert [file.id async for file in it.client.files.list()] == [batch.input_file_id]
    await it.client.files.delete(batch.input_file_id)
    assert [path for path in (it.served.log_dir / "files").rglob("*") if path.is_file()] == []
    command = it.served.system.connection.command
    assert {key.decode().split(":")[1] for key in await command("KEYS", "{@batches}:*")} <= {"batch", "list"}
    assert await command("KEYS", it.served.system.keys.request("*")) == []
    await it.served.system.until(it.served.rests, 10)


async def test_files_of_other_editors_are_batches(it: Batching) -> None:
    """A mark in front, `\\r\\n`, blank lines, no end of the last line."""
    lines = [packed(text_line(one)) for one in ("first", "zwei é 東京", "last")]
    made = await it.batch([b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines)])
    batch = await it.ended(made.id)
    assert (batch.status, batch.request_counts.total, batch.request_counts.completed) == ("completed", 3, 3)
    results = await it.lines(batch.output_file_id)
    assert {line["custom_id"] for line in results} == {"first", "zwei é 東京", "last"}
    for file_id in (batch.output_file_id, batch.input_file_id):
        await it.client.files.delete(file_id)


async def test_what_cannot_be_a_batch_is_refused_when_it_is_made(it: Batching) -> None:
    file_id = await it.upload([GOOD])
    large = await it.upload([b"x" * (11 * MIB + 1)])
    before = len([batch async for batch in it.client.batches.list()])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_file_id": large}, "input_file_id"),
        ({"input_file_id": "file-unknown"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"a": "x" * 600}}, "metadata"),
    ]
    for fields, param in cases:
        asked: dict[str, Any] = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(openai.BadRequestError) as caught:
            await it.client.batches.create(**(asked | fields))
        assert str(caught.value.param).startswith(param)
    assert len([batch async for batch in it.client.batches.list()]) == before
    for one in (file_id, large):
        await it.client.files.delete(one)


async def test_a_file_that_is_deleted_before_it_is_read_fails_its_batch(it: Batching) -> None:
    """The worker is not there when the batch is made."""
    (worker,) = [process for process in it.served.system.processes if "batch" in process.args]  # type: ignore[operator]
    worker.terminate()
    await it.served.system.until(lambda: worker.poll() is not None, 20)
    made = await it.batch([GOOD])
    await it.client.files.delete(made.input_file_id)
    it.worker()
    batch = await it.ended(made.id)
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [(None, "file_not_found")]
