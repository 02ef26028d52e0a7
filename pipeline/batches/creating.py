"""A batch is made: what is asked for, whether it can be, its record, its job. For the API and for the command line."""

from __future__ import annotations

import re
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipeline.batches.jobs import BatchQueue
from pipeline.batches.record import CANCELLED, CANCELLING, IDS, BatchRecord
from pipeline.batches.records import BatchRecords, Hold
from pipeline.config import BatchesSettings
from pipeline.errors import BatchNotFound, InvalidRequest, NoSuchFile
from pipeline.files.store import FileStore
from pipeline.ids import new_process_name
from pipeline.surface.bodies import decoded, digest
from pipeline.surface.fields import Anchor, Life
from pipeline.surface.responses_bodies import Metadata

INPUT = "batch"  # the purpose of files that batches read
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST_WINDOW_S = 30 * 86_400

Window = Annotated[
    str, Meta(pattern=f"^{_WINDOW.pattern}$", description="A number and s, m, h or d, up to 30d; OpenAI's clients know 24h.")
]  # fmt: skip


class OutputLife(msgspec.Struct):
    """How long the files of the results live."""

    anchor: Anchor
    seconds: Life


class BatchBody(msgspec.Struct, kw_only=True):
    """The body of /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Window
    metadata: Metadata | None = None
    output_expires_after: OutputLife | None = None


_decoder = msgspec.json.Decoder(BatchBody)


def batch_body(raw: bytes) -> BatchBody:
    """Decode and check a body. Raises InvalidRequest with the path of the first thing that is wrong."""
    body: BatchBody = decoded(_decoder, raw)
    window_s(body.completion_window)
    return body


def window_s(window: str) -> int:
    """Seconds of a completion window. Raises InvalidRequest."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_WINDOW_S:
        raise InvalidRequest(
            f"completion_window: expected 24h or another number of s, m, h or d, up to 30d, not {window[:20]!r}",
            param="completion_window",
        )
    return seconds


class Batches:
    """All batches: makes them, finds them, cancels them. Methods raise RedisUnavailable."""

    def __init__(self, settings: BatchesSettings, records: BatchRecords, files: FileStore, queue: BatchQueue) -> None:
        self._settings = settings
        self._records = records
        self._files = files
        self._queue = queue

    async def create(self, body: BatchBody, *, owner: str, models: str = "", idempotency_key: str = "") -> BatchRecord:
        """Make a batch, or find the one that was made under the key. Raises InvalidRequest, QueueFull."""
        await self._check_file(body.input_file_id, owner)
        now_s, life = time.time(), body.output_expires_after
        record = BatchRecord(
            id=IDS.new(now_s), owner=owner, state="validating", endpoint=body.endpoint,
            input_file_id=body.input_file_id, window=body.completion_window, created_s=int(now_s),
            deadline_s=int(now_s) + window_s(body.completion_window), models=models,
            metadata=msgspec.json.encode(body.metadata).decode() if body.metadata else "",
            output_life_s=life.seconds if life is not None else 0,
        )  # fmt: skip
        batch_id = await self._records.put(record, idempotency_key, digest(body))
        if batch_id != record.id:
            return await self.find(batch_id, owner)
        await self._queue.enqueue_soon(record.id)
        return record

    async def find(self, batch_id: str, owner: str) -> BatchRecord:
        """A batch of an owner. Raises BatchNotFound, also for those of others."""
        record = await self._records.find(batch_id) if IDS.has(batch_id) else None
        if record is None or record.owner != owner:
            raise BatchNotFound(batch_id)
        return record

    async def page(self, owner: str, *, after: str, limit: int) -> tuple[list[BatchRecord], bool]:
        """A page of an owner's batches, the newest first, and whether more follow."""
        found = await self._records.page(owner, after, limit + 1)
        return found[:limit], len(found) > limit

    async def cancel(self, batch_id: str, owner: str) -> BatchRecord:
        """End a batch; what has been answered is kept. One that ends, or has, stays what it is; one that waits ends at once."""
        record = await self.find(batch_id, owner)
        if record.may_become(CANCELLING):
            await self._records.turn(record, CANCELLING, cancelling_s=int(time.time()))
            await self._end_unbegun(batch_id, owner)
        return await self.find(batch_id, owner)

    async def _end_unbegun(self, batch_id: str, owner: str) -> None:
        """Nothing is to be done for a batch that no worker has begun: it need not wait for one."""
        record = await self.find(batch_id, owner)
        if record.in_progress_s:
            return
        hold = await self._records.take(batch_id, new_process_name("cancel"))
        if isinstance(hold, Hold):  # else a worker reads its input, and ends it
            await self._records.turn(record, CANCELLED, hold, cancelled_s=int(time.time()))

    async def _check_file(self, file_id: str, owner: str) -> None:
        try:
            file = await self._files.find(file_id, owner)
        except NoSuchFile as error:
            raise InvalidRequest(f"input_file_id: {error}", param="input_file_id") from error
        if file.purpose != INPUT:
            raise InvalidRequest(
                f"input_file_id: the purpose of {file.id} is {file.purpose!r}, not {INPUT!r}", param="input_file_id"
            )
        if file.bytes > self._settings.max_bytes:
            raise InvalidRequest(
                f"input_file_id: {file.id} has {file.bytes} bytes, a batch at most {self._settings.max_bytes} "
                f"({self._settings.max_bytes >> 20} MB): send it as several",
                param="input_file_id",
            )
