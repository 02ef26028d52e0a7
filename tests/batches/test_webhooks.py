"""The end of a batch is told to a receiver, in a way that OpenAI's client believes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pipeline.batches.record import BatchRecord
from pipeline.config import BatchesSettings
from pipeline.errors import ConfigError
from pipeline.keys import batches_untold
from pipeline.redis_server import RedisServer
from tests.batches.running import Batching, batching, text_line
from workers.batch.webhooks import GIVE_UP_S, LONGEST_PAUSE_S, message, pause_s, secret_of

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
SLOW = ("engine.mock.decode_base_ms=20", "batches.max_in_flight=2")


@dataclasses.dataclass
class Receiver:
    """A small server: the first answers are those of `statuses`, 0 for none at all; the others are 200."""

    statuses: list[int]
    url: str = ""
    told: list[tuple[dict[str, str], bytes]] = dataclasses.field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head) if name}
            self.told.append((headers, await reader.readexactly(int(headers["content-length"]))))
            status = self.statuses.pop(0) if self.statuses else 200
            if not status:
                await reader.read()  # until the other side leaves
            writer.write(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            await writer.drain()
        writer.close()

    def events(self) -> list[Any]:
        """What was told; raises where OpenAI's client would not believe it."""
        client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
        return [client.webhooks.unwrap(body, headers) for headers, body in self.told]


@contextlib.asynccontextmanager
async def receiving(*statuses: int) -> AsyncIterator[Receiver]:
    receiver = Receiver(list(statuses))
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    yield receiver
    server.close()


def settings_of(receiver: Receiver) -> tuple[str, ...]:
    return f"batches.webhook_url={receiver.url}", f"batches.webhook_secret={SECRET}"


async def all_told(it: Batching) -> None:
    async def none_is_left() -> bool:
        return not await it.served.system.connection.command("EXISTS", batches_untold())

    await it.served.system.until(none_is_left, 60)


async def test_each_end_of_a_batch_is_told_and_openais_client_believes_it(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with receiving() as receiver, batching(default_redis_server, tmp_path, *SLOW, *settings_of(receiver)) as it:
        completed = await it.ended((await it.batch([text_line("1"), text_line("2")])).id)
        failed = await it.ended((await it.batch([text_line("1"), text_line("1")])).id)
        many = [text_line(str(number), max_tokens=50) for number in range(300)]
        expired = await it.ended((await it.batch(many, completion_window="3s")).id)
        running = await it.batch(many)
        waiting = await it.batch(many)
        assert (await it.client.batches.cancel(waiting.id)).status == "cancelled"  # by the API: no worker ever had it
        await it.client.batches.cancel(running.id)
        batches = [completed, failed, expired, await it.ended(running.id), await it.ended(waiting.id)]
        await all_told(it)
        assert [one.status for one in batches] == ["completed", "failed", "expired", "cancelled", "cancelled"]
        assert {(one.type, one.data.id) for one in receiver.events()} == {
            (f"batch.{one.status}", one.id) for one in batches
        }
        assert receiver.events()[0].created_at == completed.completed_at
        assert len({headers["webhook-id"] for headers, _ in receiver.told}) == len(receiver.told) == 5
        headers, body = receiver.told[0]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            openai.OpenAI(api_key="none", webhook_secret=SECRET).webhooks.unwrap(body + b" ", headers)


async def test_a_receiver_that_fails_or_hangs_is_told_again_and_holds_up_nothing(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        receiving(500, *[0] * 100) as receiver,
        batching(default_redis_server, tmp_path, *settings_of(receiver)) as it,
    ):
        first = await it.ended((await it.batch([text_line("1")])).id)

        async def hangs() -> bool:
            return len(receiver.told) >= 2

        await it.served.system.until(hangs, 30)
        second = await it.ended((await it.batch([text_line("1")])).id)
        receiver.statuses.clear()  # until now it has answered nothing
        await all_told(it)
        events = receiver.events()
        assert [one.data.id for one in events[:2]] == [first.id] * 2
        assert {one.data.id for one in events[2:]} == {first.id, second.id}
        assert len({headers["webhook-id"] for headers, _ in receiver.told}) == 2


async def test_what_a_killed_worker_did_not_tell_the_next_one_tells(
    default_redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        receiving(*[503] * 3) as receiver,
        batching(default_redis_server, tmp_path, *settings_of(receiver), workers=0) as it,
    ):
        worker = it.worker()
        batch = await it.ended((await it.batch([text_line("1")])).id)

        async def was_tried() -> bool:
            return len(receiver.told) > 0

        await it.served.system.until(was_tried, 30)
        worker.kill()
        tried = len(receiver.told)
        it.worker()
        await all_told(it)
        assert len(receiver.told) > tried
        assert {one.data.id for one in receiver.events()} == {batch.id}


def test_a_message_is_signed_over_its_id_its_time_and_its_body() -> None:
    record = BatchRecord(
        id="batch_1", owner="", state="failed", endpoint="/v1/completions", input_file_id="file-1", window="24h",
        created_s=1, deadline_s=2, failed_s=5,
    )  # fmt: skip
    told = message(record, KEY, 10.9)
    assert (told.headers["webhook-id"], told.headers["webhook-timestamp"]) == ("evt_1", "10")
    assert told.body == b'{"id":"evt_1","object":"event","created_at":5,"type":"batch.failed","data":{"id":"batch_1"}}'
    assert told.headers["webhook-signature"].startswith("v1,")
    assert message(record, KEY, 11.0).headers["webhook-signature"] != told.headers["webhook-signature"]


def test_pauses_double_up_to_an_hour_and_end_after_a_day() -> None:
    assert [pause_s(since) for since in (0, 0.5, 1, 2, 100)] == [1, 1, 1, 2, 100]
    assert pause_s(50_000) == LONGEST_PAUSE_S
    assert pause_s(GIVE_UP_S + 1) is None


@pytest.mark.parametrize(
    ("url", "secret", "what"),
    [
        ("hooks.example", SECRET, "webhook_url"), ("https://a.example", "", "webhook_secret"),
        ("https://a.example", SECRET.removeprefix("whsec_"), "webhook_secret"), ("https://a.example", "whsec_short", "webhook_secret"),
        ("https://a.example", "whsec_" + "!" * 44, "webhook_secret"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(url: str, secret: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"^batches\.{what}: expected"):
        secret_of(BatchesSettings(webhook_url=url, webhook_secret=secret))


def test_right_settings_are_taken() -> None:
    assert secret_of(BatchesSettings(webhook_url="https://a.example/x", webhook_secret=SECRET)) == KEY
