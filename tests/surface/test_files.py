"""Files by OpenAI's own client and by clients that leave: over a folder, and over a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import pytest_asyncio
from openai.types import FileDeleted, FileObject

from pipeline.cli.keys import new_key
from pipeline.key_store import KeyStore
from pipeline.redis_server import RedisServer
from tests.object_store import object_store
from tests.openai_types import strictly
from tests.serving import Served, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/files"
MB = 1_000_000
LARGE = 200 * MB
MOST_GROWTH = 64 * 2**20
LINE = b'{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'
BOUNDARY = "line"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
).encode()


class Stored(Served):
    """With a look at its store."""

    objects: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["folder", "s3"])
async def served(
    request: pytest.FixtureRequest, default_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stored]:
    folder = tmp_path_factory.mktemp("files")
    with contextlib.ExitStack() as stack:
        overrides: list[str] = []
        if request.param == "s3":
            s3 = stack.enter_context(object_store(folder))
            overrides = [f"files.url={s3.url}", f"files.storage_options={s3.options}"]
        async with serving(default_redis_server, folder, *overrides, stages="") as made:
            stored = Stored(made.system, made.url, folder)
            stored.objects = (lambda: [*s3.objects(), *s3.uploads()]) if overrides else lambda: objects_in(folder)
            yield stored


def objects_in(folder: Path) -> list[Path]:
    return [path for path in (folder / "files").rglob("*") if path.is_file()]


@pytest.fixture(scope="session")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    lines = b"".join(LINE % number for number in range(10_000))
    with path.open("wb") as file:
        for _ in range(LARGE // len(lines)):
            file.write(lines)
    yield path
    path.unlink()


class Peak:
    """The most memory that a process has while this is entered, beyond what it had before."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.growth = 0

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)

    def __enter__(self) -> Peak:
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


async def upload(
    http: httpx.AsyncClient, data: bytes = b"{}\n", name: str = "a.jsonl", **fields: str
) -> dict[str, Any]:
    made = await http.post(PATH, data={"purpose": "batch"} | fields, files={"file": (name, data)})
    assert made.status_code == 200, made.text
    return dict(made.json())


async def is_empty(served: Stored) -> bool:
    return not await asyncio.to_thread(served.objects)


async def test_the_official_client_does_everything(served: Stored) -> None:
    def use(client: openai.OpenAI) -> None:
        data = b"".join(LINE % number for number in range(MB // 80))
        life = {"anchor": "created_at", "seconds": 3600}
        made = client.files.create(file=("in.jsonl", data), purpose="batch", expires_after=life)  # type: ignore[arg-type]
        assert (made.bytes, made.filename, made.purpose, made.status) == (len(data), "in.jsonl", "batch", "processed")
        assert made.expires_at == made.created_at + 3600
        assert client.files.retrieve(made.id) == made
        assert client.files.wait_for_processing(made.id) == made
        assert client.files.content(made.id).read() == data
        others = [client.files.create(file=b"%d" % number, purpose="batch") for number in range(4)]
        ids = [made.id, *(one.id for one in others)]
        assert [one.id for one in client.files.list(order="asc", limit=2)] == ids  # it turns the pages
        for one in client.files.list(limit=2, purpose="batch"):
            deleted = client.files.delete(one.id)
            assert (deleted.id, deleted.deleted) == (one.id, True)
        assert list(client.files.list()) == []
        with pytest.raises(openai.NotFoundError, match="No such File object: "):
            client.files.content(made.id)

    with client_of(served) as client:
        await asyncio.to_thread(use, client)
    assert await is_empty(served)


async def test_what_is_large_is_never_whole_in_memory(
    served: Stored, large_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def use(client: openai.OpenAI) -> tuple[int, int]:
        small = client.files.create(file=b"x", purpose="batch")  # what a first one loads is not what a large one takes
        client.files.content(small.id)
        client.files.delete(small.id)
        with Peak(served.api.pid) as up, large_file.open("rb") as file:
            made = client.files.create(file=file, purpose="batch")
        assert made.bytes == large_file.stat().st_size > LARGE - MB
        digest = hashlib.sha256()
        with Peak(served.api.pid) as down, client.files.with_streaming_response.content(made.id) as content:
            for block in content.iter_bytes(MB):
                digest.update(block)
        with large_file.open("rb") as file:
            assert digest.digest() == hashlib.file_digest(file, "sha256").digest()
        client.files.delete(made.id)
        return up.growth, down.growth

    with client_of(served) as client:
        up, down = await asyncio.to_thread(use, client)
    with capsys.disabled():
        print(f"\n200 MB: the API's memory grows by {up / 2**20:.0f} MiB up, {down / 2**20:.0f} MiB down")
    assert max(up, down) < MOST_GROWTH


async def test_uploads_at_once_do_not_mix(served: Stored) -> None:
    async with served.http() as http:
        datas = [bytes([65 + number]) * 3 * MB for number in range(6)]
        made = await asyncio.gather(*(upload(http, data, f"{number}") for number, data in enumerate(datas)))
        for data, one in zip(datas, made, strict=True):
            assert (await http.get(f"{PATH}/{one['id']}/content")).content == data
            assert strictly(FileObject, one).bytes == len(data)
            strictly(FileDeleted, (await http.delete(f"{PATH}/{one['id']}")).json())
    assert await is_empty(served)


async def begin_upload(url: str, size: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that has sent so much of a file and goes on later, or not."""
    base = httpx.URL(url)
    reader, writer = await asyncio.open_connection(base.host, base.port)
    headers = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM['content-type']}\r\ncontent-length: {10**8}\r\n\r\n"
    )
    writer.write(headers.encode() + HEAD + b"x" * size)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("size", [10, 30 * MB])
async def test_a_client_that_leaves_within_an_upload_leaves_nothing(served: Stored, size: int) -> None:
    _, writer = await begin_upload(served.url, size)
    if size > MB:
        await served.system.until(lambda: asyncio.to_thread(served.objects), 20)
    writer.transport.abort()
    await served.system.until(lambda: is_empty(served), 20)
    async with served.http() as http:
        assert (await http.get(PATH)).json()["data"] == []
    assert "Traceback" not in served.api_log()


async def test_an_upload_that_is_too_large_is_told_so_and_leaves_nothing(served: Stored, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(513 * 2**20)

    def use() -> None:
        refused = pytest.raises(openai.APIStatusError, match=r"files\.max_bytes")
        with sparse.open("rb") as file, client_of(served) as client, refused as wrong:
            client.files.create(file=file, purpose="batch")
        assert (wrong.value.status_code, wrong.value.code) == (413, "file_too_large")

    await asyncio.to_thread(use)

    async def padded() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield f"--{BOUNDARY}\r\nx: {'y' * 4000}\r\n\r\n\r\n".encode()

    async with served.http() as http:
        told = await http.post(PATH, content=padded(), headers=FORM)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")
    assert await is_empty(served)


async def test_names_of_files_are_harmless(served: Stored) -> None:
    async with served.http() as http:
        for given, kept, header in (
            ("../../etc/passwd", "passwd", "passwd"),
            ("漢 字.jsonl", "漢 字.jsonl", "%E6%BC%A2%20%E5%AD%97.jsonl"),
            ("a;b.jsonl", "a;b.jsonl", "a%3Bb.jsonl"),
        ):
            made = await upload(http, name=given)
            assert made["filename"] == kept
            content = await http.get(f"{PATH}/{made['id']}/content")
            assert content.headers["content-disposition"] == f"attachment; filename*=UTF-8''{header}"
            await http.delete(f"{PATH}/{made['id']}")


async def test_a_file_whose_bytes_are_gone_is_an_answer_of_its_own(served: Stored) -> None:
    async with served.http() as http:
        made = await upload(http, b"x" * 10)
        record = await served.system.connection.command("HGET", f"{{@files}}:file:{made['id']}", "place")
        await served.system.connection.command("HSET", f"{{@files}}:file:{made['id']}", "place", record + b"x")
        content = await http.get(f"{PATH}/{made['id']}/content")
        assert (content.status_code, content.json()["error"]["code"]) == (500, "file_lost")
        await served.system.connection.command("HSET", f"{{@files}}:file:{made['id']}", "place", record)
        assert (await http.head(f"{PATH}/{made['id']}/content")).headers["content-length"] == "10"
        await http.delete(f"{PATH}/{made['id']}")


async def test_an_api_that_is_killed_within_an_upload_leaves_nothing_for_long(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    overrides = ("files.upload_s=1", "files.sweep_s=0.3", "files.expires_after_s=1")
    async with serving(default_redis_server, tmp_path, *overrides, stages="") as served:
        async with served.http() as http:
            expires = await upload(http)
        _, writer = await begin_upload(served.url, 5 * MB)
        await served.system.until(lambda: any(path.stat().st_size > MB for path in objects_in(tmp_path)), 20)
        served.api.kill()
        await asyncio.to_thread(served.api.wait)
        writer.close()
        assert objects_in(tmp_path)
        url = await served.system.api()
        await served.system.until(lambda: not objects_in(tmp_path), 20)
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.get(f"{PATH}/{expires['id']}")).status_code == 404
            assert (await http.get(PATH)).json()["data"] == []
        assert await served.system.connection.command("KEYS", "*file-*") == []


async def test_a_reader_that_takes_nothing_and_a_server_that_leaves(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    overrides = ("api.send_timeout_s=1", "api.shutdown_grace_s=0.2")
    async with serving(default_redis_server, tmp_path, *overrides, stages="") as served:
        async with served.http() as http:
            made = await upload(http, b"x" * 50 * MB)
            async with http.stream("GET", f"{PATH}/{made['id']}/content"):
                await served.system.until(lambda: "a download did not end" in served.api_log(), 20)
        reader, writer = await begin_upload(served.url, 5 * MB)
        await served.system.until(lambda: len(objects_in(tmp_path)) == 2, 20)
        served.api.terminate()
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        assert await asyncio.to_thread(served.api.wait, 20) == 0
        writer.close()
        assert [path.name for path in objects_in(tmp_path)] == [made["id"]]
        assert "Traceback" not in served.api_log()


async def test_an_upload_that_takes_too_long_is_told_so(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        serving(default_redis_server, tmp_path, "files.upload_s=0.5", stages="") as served,
        served.http() as http,
    ):

        async def slow() -> AsyncIterator[bytes]:
            yield HEAD
            for _ in range(40):
                yield b"x" * 100_000
                await asyncio.sleep(0.05)

        answer = await http.post(PATH, content=slow(), headers=FORM)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "upload_timeout")
        assert answer.headers["x-should-retry"] == "false"
        assert objects_in(tmp_path) == []


async def test_uploads_at_once_are_counted_and_one_that_stands_still_is_given_up(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    overrides = ("files.max_uploads=1", "api.body_timeout_s=1.5")
    async with serving(default_redis_server, tmp_path, *overrides, stages="") as served, served.http() as http:
        reader, writer = await begin_upload(served.url, 5 * MB)
        await served.system.until(lambda: objects_in(tmp_path), 20)
        refused = await http.post(PATH, data={"purpose": "batch"}, files={"file": ("a", b"x")})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert objects_in(tmp_path) == []
        await upload(http)


async def is_known(http: httpx.AsyncClient, key: str) -> bool:
    return (await http.get(PATH, headers={"authorization": f"Bearer {key}"})).status_code == 200


async def test_files_of_one_key_are_not_there_for_another(default_redis_server: RedisServer, tmp_path: Path) -> None:
    async with serving(
        default_redis_server, tmp_path, "api.auth=required", "api.keys_refresh_s=0.1", stages=""
    ) as served:
        keys = [new_key(name, expires_in=None) for name in ("mine", "yours")]
        for one in keys:
            await KeyStore(served.system.connection).put(one.key)

        def use(mine: openai.OpenAI, yours: openai.OpenAI, nobody: openai.OpenAI) -> None:
            made = mine.files.create(file=b"x", purpose="batch")
            for call in (yours.files.retrieve, yours.files.content, yours.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(made.id)
            assert list(yours.files.list()) == []
            assert [one.id for one in mine.files.list()] == [made.id]
            with pytest.raises(openai.AuthenticationError):
                nobody.files.list()

        async with served.http() as http:
            await served.system.until(lambda: is_known(http, keys[1].secret), 20)
        mine, yours = (client_of(served, one.secret) for one in keys)
        with mine, yours, client_of(served) as nobody:
            await asyncio.to_thread(use, mine, yours, nobody)


async def test_a_store_that_does_not_answer_is_a_503(default_redis_server: RedisServer, tmp_path: Path) -> None:
    options = json.dumps({"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"})
    overrides = ("files.url=s3://nowhere", f"files.storage_options={options}", "files.timeout_s=1")
    async with serving(default_redis_server, tmp_path, *overrides, stages="") as served, served.http() as http:
        answer = await http.post(PATH, data={"purpose": "batch"}, files={"file": b"x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "storage_unavailable")
        assert "secret" not in answer.text
        assert answer.headers["x-should-retry"] == "true"
        assert (await http.get(PATH)).json()["data"] == []
