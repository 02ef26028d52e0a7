"""One suite for every kind of store: a folder, memory, and a real S3 server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.config import FilesSettings, RedisSettings
from pipeline.connection import Connection
from pipeline.errors import ConfigError, FileLost, FileTooLarge, NoSuchFile, StorageUnavailable, UploadTimeout
from pipeline.files.record import FileRecord
from pipeline.files.store import FileStore
from tests.object_store import ObjectStore, object_store

KINDS = ("folder", "memory", "s3")
MIB = 2**20


class Clock:
    """Stands still unless it is moved."""

    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        self.now_s += 0.001  # files have an order
        return self.now_s


class Place:
    """A store with what a test looks at behind its back."""

    def __init__(self, settings: FilesSettings, connection: Connection, s3: ObjectStore | None) -> None:
        self.clock = Clock()
        self.settings = settings
        self.store = FileStore(settings, connection, self.clock)
        self.connection = connection
        self.s3 = s3
        self._fs, self._root = fsspec.core.url_to_fs(settings.url) if s3 is None else (s3.fs(), settings.url)

    def objects(self) -> list[str]:
        self._fs.invalidate_cache()
        return [str(path) for path in self._fs.find(self._root)]

    def forget(self, path: str) -> None:
        self._fs.rm(path)

    async def keys(self) -> list[bytes]:
        lasting = (b"{@files}:folder", b"{@files}:sweeper")
        return [key for key in await self.connection.command("KEYS", "*") if key not in lasting]

    async def make(self, data: bytes = b"abc", owner: str = "me", purpose: str = "batch", **more: Any) -> FileRecord:
        async with self.store.upload() as upload:
            await upload.write(data)
            return await upload.finish(owner=owner, purpose=purpose, filename="a.jsonl", **more)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=KINDS)
async def place(request: pytest.FixtureRequest, default_redis_url: str, tmp_path: Path) -> AsyncIterator[Place]:
    s3 = request.getfixturevalue("s3_server") if request.param == "s3" else None
    url = {"folder": str(tmp_path / "files"), "memory": f"memory://{tmp_path.name}"}.get(
        request.param
    ) or f"{s3.url}/{tmp_path.name}"
    connection = Connection(RedisSettings(url=default_redis_url))
    made = Place(FilesSettings(url=url, storage_options=s3.options if s3 else "", upload_s=1800), connection, s3)
    yield made
    await connection.close()


async def whole(place: Place, record: FileRecord) -> bytes:
    return b"".join([block async for block in place.store.blocks(record, 0, record.bytes)])


@pytest.mark.parametrize("size", [0, 1, MIB, 9 * MIB + 7, 20 * MIB])
async def test_what_was_written_is_read(place: Place, size: int) -> None:
    data = os.urandom(size)
    async with place.store.upload() as upload:
        for begin in range(0, size, 300_001):
            await upload.write(data[begin : begin + 300_001])
        made = await upload.finish(owner="me", purpose="batch", filename="../etc/a b.jsonl", expires_after_s=3600)
    found = await place.store.find(made.id, "me")
    assert found == made
    assert (found.bytes, found.filename, found.purpose) == (size, "a b.jsonl", "batch")
    assert found.expires_s == found.created_s + 3600
    assert await whole(place, found) == data
    for start, stop in ((0, 0), (size // 2, size // 2 + 1), (size - 1, size)):
        if 0 <= start <= stop <= size:
            assert await place.store.read(found, start, stop) == data[start:stop]
    assert len(place.objects()) == 1


async def test_two_uploads_at_once(place: Place) -> None:
    async def send(letter: bytes) -> FileRecord:
        async with place.store.upload() as upload:
            for _ in range(10):
                await upload.write(letter * MIB)
                await asyncio.sleep(0)
            return await upload.finish(owner="me", purpose="batch", filename="x")

    records = await asyncio.gather(*(send(letter) for letter in (b"a", b"b", b"c")))
    assert [await whole(place, record) for record in records] == [letter * 10 * MIB for letter in (b"a", b"b", b"c")]


@pytest.mark.parametrize("size", [0, 100, 3 * MIB, 20 * MIB])
async def test_an_upload_that_ends_before_its_end_leaves_nothing(place: Place, size: int) -> None:
    with pytest.raises(ConnectionResetError):
        async with place.store.upload() as upload:
            for _ in range(0, size, MIB):
                await upload.write(b"x" * min(size, MIB))
            raise ConnectionResetError
    assert place.objects() == []
    assert place.s3 is None or place.s3.uploads() == []
    assert await place.keys() == []


async def test_an_upload_has_limits(place: Place) -> None:
    with pytest.raises(FileTooLarge, match="more than 10 bytes"):
        async with place.store.upload(10) as upload:
            await upload.write(b"x" * 10)
            await upload.write(b"x")
    place.store.settings = FilesSettings(upload_s=0.2)
    with pytest.raises(UploadTimeout, match=r"files\.upload_s"):
        async with place.store.upload() as upload:
            await upload.write(b"x" * 2 * MIB)
            await asyncio.sleep(60)
    assert place.objects() == []
    assert await place.keys() == []


async def test_files_of_others_are_not_there(place: Place) -> None:
    record = await place.make()
    for file_id, owner in (
        (record.id, "you"),
        (record.id, ""),
        (record.id[:-1], "me"),
        ("file-abc", "me"),
        ("x" * 9999, "me"),
    ):
        with pytest.raises(NoSuchFile, match="No such File object"):
            await place.store.find(file_id, owner)


async def test_pages(place: Place) -> None:
    made = [await place.make(purpose=("batch", "batch_output")[number % 2]) for number in range(7)]
    await place.make(owner="you")

    async def pages(purpose: str, newest_first: bool, limit: int = 2) -> list[FileRecord]:
        after, seen = "", []
        while True:
            page, more = await place.store.page(
                "me", purpose=purpose, after=after, limit=limit, newest_first=newest_first
            )
            seen += page
            if not more:
                return seen
            assert len(page) == limit
            after = page[-1].id

    assert await pages("", False) == made
    assert await pages("", True) == made[::-1]
    assert await pages("batch", False) == made[::2]
    assert await pages("batch_output", True, 3) == made[1::2][::-1]
    assert await pages("vision", True) == []
    await place.store.delete(made[3])  # a reader that deletes what it has seen goes on behind it
    page, more = await place.store.page("me", purpose="", after=made[3].id, limit=2, newest_first=False)
    assert (page, more) == (made[4:6], True)


async def test_a_page_is_full_whatever_has_expired_before_it(place: Place) -> None:
    expired = [await place.make(expires_after_s=10 + number) for number in range(5)]
    made = [await place.make() for _ in range(3)]
    place.clock.now_s += 60
    for limit in (1, 2, 3):
        page, more = await place.store.page("me", purpose="batch", after=expired[0].id, limit=limit, newest_first=False)
        assert (page, more) == (made[:limit], limit < 3)


async def test_a_file_that_is_deleted_is_gone_at_once(place: Place) -> None:
    record, other = await place.make(), await place.make()
    await place.store.delete(record)
    await place.store.delete(record)
    with pytest.raises(NoSuchFile):
        await place.store.find(record.id, "me")
    assert [path.rpartition("/")[2] for path in place.objects()] == [other.id]
    await place.store.delete(other)
    assert await place.keys() == []


async def test_what_has_expired_is_gone_before_it_is_swept(place: Place) -> None:
    record, stays = await place.make(expires_after_s=3600), await place.make()
    place.clock.now_s += 3601
    with pytest.raises(NoSuchFile):
        await place.store.find(record.id, "me")
    page, _ = await place.store.page("me", purpose="", after="", limit=10, newest_first=True)
    assert page == [stays]
    assert await place.store.sweep() == (1, 0)
    assert [path.rpartition("/")[2] for path in place.objects()] == [stays.id]
    assert await place.store.sweep() == (0, 0)


async def test_what_a_process_left_that_died_is_swept_when_it_is_old(place: Place) -> None:
    whole_file = await place.make()
    never_left = place.store.upload()
    upload = await never_left.__aenter__()
    await upload.write(b"x" * 20 * MIB)
    left = await place.make()
    await place.connection.command("DEL", f"{{@files}}:file:{left.id}")  # died before its record
    place.clock.now_s += 3500
    assert await place.store.sweep() == (0, 0)
    place.clock.now_s += 200
    assert await place.store.sweep() == (0, 2)
    assert [path.rpartition("/")[2] for path in place.objects()] == [whole_file.id]
    assert place.s3 is None or place.s3.uploads() == []
    assert await whole(place, whole_file) == b"abc"
    await never_left.__aexit__(None, None, None)


async def test_what_another_redis_knows_of_is_not_swept(place: Place) -> None:
    await place.make()
    await place.connection.command("FLUSHALL")
    place.clock.now_s += 1_000_000
    assert await place.store.sweep() == (0, 0)
    assert len(place.objects()) == 1


async def test_bytes_that_somebody_removed_are_told_of(place: Place) -> None:
    record = await place.make()
    place.forget(place.objects()[0])
    with pytest.raises(FileLost):
        await place.store.read(record, 0, 3)
    await place.store.delete(record)
    assert await place.keys() == []


def of(url: str, options: str = "") -> FilesSettings:
    return FilesSettings(url=url, storage_options=options, timeout_s=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (of("nothing://x"), r"files\.url.*nothing"),
        (of("x", "[1]"), r"files\.storage_options: expected a JSON object"),
        (of("s3://x", '{"key": 1, "username": 2}'), r"files\.url, files\.storage_options"),
    ],
)
def test_a_store_that_cannot_be_is_an_error_of_the_settings(settings: FilesSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FileStore(settings, Connection(RedisSettings(url="redis://127.0.0.1:1")))


async def test_a_bucket_that_is_not_there_is_told_of(default_redis_url: str, s3_server: ObjectStore) -> None:
    connection = Connection(RedisSettings(url=default_redis_url))
    store = FileStore(of("s3://not-there/x", s3_server.options), connection)
    for size in (1, 20 * MIB):
        with pytest.raises(StorageUnavailable, match="failed to"):
            async with store.upload() as upload:
                await upload.write(b"x" * size)
                await upload.finish(owner="", purpose="batch", filename="x")
    with pytest.raises(StorageUnavailable):
        await store.sweep()
    await connection.close()


async def test_a_store_that_fails_is_told_of_and_leaves_no_record(default_redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    connection = Connection(RedisSettings(url=default_redis_url))
    store = FileStore(of(str(tmp_path / "file")), connection)
    with pytest.raises(StorageUnavailable, match="failed to write"):
        async with store.upload() as upload:
            await upload.write(b"x")
            await upload.finish(owner="", purpose="batch", filename="x")
    assert await connection.command("KEYS", "*file-*") == []
    await connection.close()
