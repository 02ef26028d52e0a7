"""The end of a batch: its files are made of its parts, then it is over, then the parts go.

A file's id is in the record before the file is there, so that whoever takes up a batch that was nearly over removes what its predecessor
made, and makes it anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import structlog

from pipeline.batches.lines import line_again, raw_lines
from pipeline.batches.record import CANCELLED, CANCELLING, COMPLETED, EXPIRED, BatchRecord, LineError
from pipeline.batches.records import BatchRecords, Done, Hold
from pipeline.errors import NoSuchFile
from pipeline.files.store import FileStore, Upload
from workers.batch.results import is_success, missing_line

PURPOSE = "batch_output"

NOT_RUN = {
    CANCELLED: LineError("batch_cancelled", "the batch was cancelled before this request was answered"),
    EXPIRED: LineError("batch_expired", "the completion window was over before this request was answered"),
}

log = structlog.get_logger("baton.batches")


NO_FILES = {"output_file_id": "", "error_file_id": ""}


async def finish(record: BatchRecord, files: FileStore, records: BatchRecords, hold: Hold) -> None:
    """Bring a batch to its end, all of whose answers are kept. Raises FileLost, Fenced, StorageUnavailable, RedisUnavailable."""
    await remove_files(record, files)
    parts, done = await records.parts(record.id), await records.done(record.id)
    end = _end_of(record, len(done))
    made: dict[str, str] = {}
    for field, wants_success in (("output_file_id", True), ("error_file_id", False)):
        lines = _lines(files, parts, wants_success=wants_success)
        if (
            not wants_success and end in NOT_RUN and record.in_progress_s
        ):  # else nobody knows whether they are lines at all
            lines = _and_missing(lines, record, files, done, NOT_RUN[end])
        name = f"{record.id}_{field.removesuffix('_file_id')}.jsonl"
        async with files.upload() as upload:
            if not await _write(upload, lines):
                continue
            await records.turn(record, record.state, hold, **{field: upload.id})
            await upload.finish(
                owner=record.owner, purpose=PURPOSE, filename=name,
                expires_after_s=record.output_life_s or files.settings.expires_after_s,
            )  # fmt: skip
            made[field] = upload.id
    now_s = int(time.time())
    await records.turn(record, end, hold, **NO_FILES | made, **{f"{end}_s": now_s})
    log.info("batch ended", batch_id=record.id, state=end, completed=record.completed, failed=record.failed)


async def remove_files(record: BatchRecord, files: FileStore) -> None:
    """What a predecessor made of a batch that has not ended."""
    for file_id in (record.output_file_id, record.error_file_id):
        with contextlib.suppress(NoSuchFile):
            await files.delete(await files.find(file_id, record.owner))


def _end_of(record: BatchRecord, done: int) -> str:
    if record.state == CANCELLING:
        return CANCELLED
    return COMPLETED if done == record.total else EXPIRED


async def _write(upload: Upload, lines: AsyncIterator[bytes]) -> bool:
    """Whether there was any line."""
    is_any = False
    async for line in lines:
        await upload.write(line)
        is_any = True
    return is_any


async def _lines(files: FileStore, parts: list[tuple[str, int]], *, wants_success: bool) -> AsyncIterator[bytes]:
    for place, nbytes in parts:
        async for raw in raw_lines(files.scratch.blocks(place, nbytes), nbytes):
            assert raw.data is not None  # a line is no longer than its part
            if is_success(raw.data) == wants_success:
                yield raw.data + b"\n"


async def _and_missing(
    lines: AsyncIterator[bytes], record: BatchRecord, files: FileStore, done: Done, error: LineError
) -> AsyncIterator[bytes]:
    """More lines, for those of the input that did not run; none where its file is gone."""
    async for line in lines:
        yield line
    with contextlib.suppress(NoSuchFile):
        file = await files.find(record.input_file_id, record.owner)
        async for raw in raw_lines(files.blocks(file, 0, file.bytes), file.bytes):
            if raw.number not in done:
                yield missing_line(record.id, line_again(raw), error)
