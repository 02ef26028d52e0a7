"""`baton batch run`: the requests of a local file go to the queues without an API, and their answers come back into a file.

It is a batch like all others, so nothing is lost, whatever dies: this command starts a batch worker and ends it, and any other one may
run it, too. Its files are taken out of the store when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from pipeline.batches.creating import INPUT, BatchBody, Batches, batch_body
from pipeline.batches.jobs import BatchQueue
from pipeline.batches.record import BatchRecord, shown
from pipeline.batches.records import BatchRecords
from pipeline.cli.batch_progress import Counts, progress
from pipeline.cli.batches import LOOKS_S, PATIENCE_S, Batch, ended_line, endpoint_of, exit_of, whole_file, wrong_lines
from pipeline.cli.options import Given
from pipeline.config import Settings
from pipeline.connection import Connection
from pipeline.errors import (
    BatonError,
    ConfigError,
    InvalidRequest,
    NoSuchFile,
    QueueFull,
    RedisUnavailable,
    RequestFailed,
)
from pipeline.exits import Exit
from pipeline.files.record import FileRecord
from pipeline.files.store import FileStore
from pipeline.processes import bound_command, ending
from pipeline.redis_server import running_redis
from pipeline.waiting import wait_at_most

LOCAL = ""  # whose the batch is: nobody's with an API key
READ_BYTES = 2**20
LEAVE_S = 15.0  # that the worker has to hand back what it runs
WAITS = "it goes on when a batch worker comes (`baton worker batch`)"

_console = Console(stderr=True, highlight=False, soft_wrap=True)


class Asked(NamedTuple):
    """What is to be done. Without `output` answers go to stdout, without `errors` what failed is counted only."""

    file: Path
    output: Path | None
    errors: Path | None
    endpoint: str | None
    window: str


def run_file(source: Given, asked: Asked) -> Exit:
    """Run all of it. Raises ConfigError, RedisUnavailable, StorageUnavailable, RequestFailed."""
    settings = source.settings()
    settings = msgspec.structs.replace(settings, redis=running_redis(settings.redis))
    return asyncio.run(_run(source, settings, asked))


async def _run(source: Given, settings: Settings, asked: Asked) -> Exit:
    body = _body(asked)
    queue = BatchQueue(settings.redis, settings.rq)
    connection = Connection(settings.redis)
    try:
        queue.check()
        await connection.reach()
        files = FileStore(settings.files, connection)
        records = BatchRecords.of(connection, settings.batches)
        batches = Batches(settings.batches, records, files, queue)
        file = await _stored(files, asked.file)
        record = await _made(batches, body, files, file)
        _say(f"{record.id}: {asked.file} ({file.bytes:,} bytes), for {body.endpoint}")
        async with _worker(source, settings) as worker:
            record = await _ended(batches, record.id, worker)
        code = await _bring(files, record, asked)
        await _forget(files, file)
        return code
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error
    finally:
        queue.close()
        await connection.close()


def _body(asked: Asked) -> BatchBody:
    endpoint = asked.endpoint or endpoint_of(asked.file)
    words = {"input_file_id": "", "endpoint": endpoint, "completion_window": asked.window}
    try:
        return batch_body(msgspec.json.encode(words))
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error


async def _stored(files: FileStore, file: Path) -> FileRecord:
    """The file in the store, where the batch worker reads it. It stays there where the batch goes on without this command."""
    async with files.upload() as upload:
        with file.open("rb") as data:
            while block := await asyncio.to_thread(data.read, READ_BYTES):
                await upload.write(block)
        return await upload.finish(owner=LOCAL, purpose=INPUT, filename=file.name)


async def _made(batches: Batches, body: BatchBody, files: FileStore, file: FileRecord) -> BatchRecord:
    """A batch of a file; one that is refused leaves no file."""
    try:
        return await batches.create(msgspec.structs.replace(body, input_file_id=file.id), owner=LOCAL)
    except (InvalidRequest, QueueFull):
        await _forget(files, file)
        raise


async def _forget(files: FileStore, file: FileRecord) -> None:
    with contextlib.suppress(BatonError):  # where it stays, it is seen in /v1/files
        await files.delete(file)


# -- who runs it ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _worker(source: Given, settings: Settings) -> AsyncIterator[Process]:
    """A batch worker that never outlives this command. Others may be listed that died a moment ago: it waits for none of them."""
    words = [sys.executable, "-m", "workers", "batch", *source.arguments(), "--set", "log.level=warning"]
    given = [] if source.settings().redis.url else ["--set", f"redis.url={settings.redis.url}"]
    process = await asyncio.create_subprocess_exec(
        *bound_command([*words, *given]), stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: Process) -> None:
    """It hands back what it runs, if anything."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(LEAVE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


# -- its end ----------------------------------------------------------------------------------------------------------


async def _ended(batches: Batches, batch_id: str, worker: Process) -> BatchRecord:
    """The batch at its end. Ctrl-C cancels it, and what was answered by then comes back; the second time it is left as it is."""
    stop, loop, waiting = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()
    assert waiting is not None

    def interrupted() -> None:
        if stop.is_set():
            waiting.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        with progress(_console, batch_id) as tell:
            async for record in _looks(batches, batch_id, stop):
                tell(record.state, Counts(**record.counts))
                if worker.returncode is not None and not record.has_ended:
                    raise RequestFailed(f"{batch_id}: its batch worker {ending(worker.returncode)}; {WAITS}")
        return record
    except asyncio.CancelledError:
        raise RequestFailed(f"{batch_id} is left as it is; {WAITS}") from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _looks(batches: Batches, batch_id: str, stop: asyncio.Event) -> AsyncIterator[BatchRecord]:
    """The batch as it stands, again and again until it has ended. A Redis that is away for a while is waited for."""
    is_cancelled, heard_s, pauses = False, time.monotonic(), iter(LOOKS_S)
    while True:
        try:
            if stop.is_set() and not is_cancelled:
                _say(f"{batch_id}: cancelling it; Ctrl-C again leaves it as it is")
                await batches.cancel(batch_id, LOCAL)
                is_cancelled = True
            record = await batches.find(batch_id, LOCAL)
        except RedisUnavailable as error:
            if time.monotonic() > heard_s + PATIENCE_S:
                raise
            _say(f"{error}; asking again")
            await asyncio.sleep(LOOKS_S[-1])
            continue
        yield record
        if record.has_ended:
            return
        heard_s, pause_s = time.monotonic(), next(pauses, LOOKS_S[-1])
        await (asyncio.sleep(pause_s) if is_cancelled else wait_at_most(stop, pause_s))


async def _bring(files: FileStore, record: BatchRecord, asked: Asked) -> Exit:
    """Its answers and errors to where they were wanted; then the store forgets them."""
    for file_id, path, is_wanted in (
        (record.output_file_id, asked.output, True), (record.error_file_id, asked.errors, asked.errors is not None)
    ):  # fmt: skip
        with contextlib.suppress(NoSuchFile):
            found = await files.find(file_id, LOCAL)
            if is_wanted:
                await _write(files, found, path)
            await files.delete(found)
    batch = msgspec.convert(shown(record), Batch)
    for line in (ended_line(batch), *wrong_lines(batch)):
        _say(line)
    return exit_of(batch)


async def _write(files: FileStore, found: FileRecord, path: Path | None) -> None:
    with contextlib.nullcontext(sys.stdout.buffer) if path is None else whole_file(path) as out:
        async for block in files.blocks(found, 0, found.bytes):
            out.write(block)
        out.flush()
    if path is not None:
        _say(f"written: {path} ({found.bytes:,} bytes)")


def _say(text: str) -> None:
    _console.print(text, markup=False)
