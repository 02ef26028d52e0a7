"""Who is told of the end of each batch: signed as Standard Webhooks and OpenAI's are, so that `client.webhooks.unwrap` reads it.

That a batch is to be told of stands in Redis before its end does, and goes when its receiver has answered, so it is told at least once,
always under the same `webhook-id`. A process beside the batch worker tells it: a receiver that hangs holds up neither batches nor rq.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import multiprocessing
import os
import signal
import time
from typing import NamedTuple

import httpx
import msgspec
import structlog

from pipeline.batches.record import BatchRecord
from pipeline.batches.records import BatchRecords
from pipeline.config import BatchesSettings, Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, ConfigError
from pipeline.processes import die_with_parent

PREFIX = "whsec_"
LEAST_SECRET, LONGEST_SECRET = 24, 64  # bytes, as Standard Webhooks has it
LOOK_S = 1.0  # between two looks for batches to be told of
AT_ONCE = 10
ANSWER_S = 10.0  # a receiver has so long
OPEN_S = 5.0  # a batch that has not ended yet is looked at again after so long
LONGEST_PAUSE_S = 3600.0  # between two tries
GIVE_UP_S = 86_400.0  # after the end of a batch

log = structlog.get_logger("baton.batches")


class Message(NamedTuple):
    """A webhook, ready to be sent."""

    headers: dict[str, str]
    body: bytes


def secret_of(settings: BatchesSettings) -> bytes:
    """What webhooks are signed with. Raises ConfigError where the settings of webhooks are not right."""
    if not settings.webhook_url.startswith(("http://", "https://")):
        raise ConfigError("batches.webhook_url: expected http://... or https://...")
    try:
        found = base64.b64decode(settings.webhook_secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        found = b""
    if not settings.webhook_secret.startswith(PREFIX) or not LEAST_SECRET <= len(found) <= LONGEST_SECRET:
        raise ConfigError(
            f"batches.webhook_secret: expected {PREFIX} and base64 of {LEAST_SECRET} to {LONGEST_SECRET} bytes: "
            f'echo "{PREFIX}$(openssl rand -base64 32)" makes one'
        )
    return found


def message(record: BatchRecord, secret: bytes, now_s: float) -> Message:
    """What is told of a batch that has ended."""
    event_id, stamp = f"evt_{record.id.removeprefix('batch_')}", str(int(now_s))
    event = {
        "id": event_id,
        "object": "event",
        "created_at": ended_s(record),
        "type": f"batch.{record.state}",
        "data": {"id": record.id},
    }
    body = msgspec.json.encode(event)
    digest = hmac.new(secret, b".".join((event_id.encode(), stamp.encode(), body)), hashlib.sha256).digest()
    return Message(
        {
            "content-type": "application/json",
            "user-agent": "Baton",
            "webhook-id": event_id,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        },
        body,
    )


def ended_s(record: BatchRecord) -> int:
    """When a batch ended."""
    return int(getattr(record, f"{record.state}_s"))


def pause_s(since_end_s: float) -> float | None:
    """How long until it is tried again, twice as long each time; None: no more."""
    return None if since_end_s > GIVE_UP_S else min(LONGEST_PAUSE_S, max(1.0, since_end_s))


class Teller:
    """Tells of batches that have ended."""

    def __init__(self, records: BatchRecords, settings: BatchesSettings, http: httpx.AsyncClient) -> None:
        self._records = records
        self._url = settings.webhook_url
        self._secret = secret_of(settings)
        self._http = http

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                due = await self._records.untold(time.time(), AT_ONCE)
                await asyncio.gather(*(self._tell(batch_id) for batch_id in due))
            except BatonError as error:
                log.warning("webhooks wait", error=str(error))
            await asyncio.sleep(LOOK_S)

    async def _tell(self, batch_id: str) -> None:
        record = await self._records.find(batch_id)
        if record is None:
            await self._records.told(batch_id)
            return
        if not record.has_ended:
            await self._records.tell_at(batch_id, time.time() + OPEN_S)
            return
        await self._records.tell_at(batch_id, time.time() + 2 * ANSWER_S)  # others do not, meanwhile
        problem = await self._send(message(record, self._secret, time.time()))
        pause = pause_s(time.time() - ended_s(record)) if problem else None
        if pause is not None:
            log.warning("webhook not taken", batch_id=batch_id, error=problem, then=f"again in {pause:.0f} s")
            await self._records.tell_at(batch_id, time.time() + pause)
            return
        if problem:
            log.error("webhook given up", batch_id=batch_id, error=problem)
        else:
            log.info("webhook sent", batch_id=batch_id, state=record.state)
        await self._records.told(batch_id)

    async def _send(self, told: Message) -> str:
        """What went wrong, or nothing."""
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                self._http.stream("POST", self._url, headers=told.headers, content=told.body) as response,
            ):
                return "" if response.is_success else f"the receiver answered {response.status_code}"
        except TimeoutError:
            return f"no answer within {ANSWER_S:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return str(error) or type(error).__name__


class TellerProcess:
    """The process that tells, where a receiver is set. It is forked, and never outlives the batch worker."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError."""
        self._settings = settings
        self._process: multiprocessing.process.BaseProcess | None = None
        if settings.batches.webhook_url:
            secret_of(settings.batches)

    def keep_running(self) -> None:
        """Start it where it is wanted and does not run."""
        if not self._settings.batches.webhook_url or (self._process is not None and self._process.is_alive()):
            return
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_tell_all, args=(self._settings, os.getpid()), daemon=True)
        self._process.start()

    def stop(self) -> None:
        """What has not been told is told by the next one."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _tell_all(settings: Settings, parent_pid: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent_pid)
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    connection = Connection(settings.redis)
    records = BatchRecords.of(connection, settings.batches)
    async with httpx.AsyncClient(timeout=ANSWER_S) as http:
        await Teller(records, settings.batches, http).run()
