"""`baton doctor`: looks at this machine and the settings as `baton up` would, and says what to do about what it finds.

Each check is a function that returns findings; none changes anything (to a store of files that is no folder an object is written,
and taken away again). An error is what would keep Baton from working, a warning what will hurt later.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from pipeline.batches.jobs import BatchQueue
from pipeline.batches.records import BatchRecords
from pipeline.cli.options import Given
from pipeline.cli.up import free_port
from pipeline.config import (
    ApiSettings,
    EngineSettings,
    FilesSettings,
    PoolSettings,
    RedisSettings,
    Settings,
    TransferSettings,
)
from pipeline.connection import Connection
from pipeline.errors import BatonError, ConfigError
from pipeline.exits import Exit, PortTaken
from pipeline.files.storage import Storage, is_folder
from pipeline.findings import Finding, Grade
from pipeline.redis_health import judge, look
from pipeline.redis_server import RedisServerError, ask_redis, find_server, running_redis
from pipeline.waiting import in_thread
from pipeline.wording import counted

_MIN_PYTHON = (3, 11)
_PATIENCE_S = 10.0  # with a store of files


async def run_doctor(source: Given, *, as_json: bool) -> int:
    """Prints all findings; returns the exit code: 1 when one is an error."""
    findings = await examine(source.settings())
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        _print(findings)
    return Exit.FAILED if any(finding.grade is Grade.ERROR for finding in findings) else Exit.OK


async def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order in which things are needed."""
    findings = [*check_python(), *await check_redis(settings.redis)]
    for name, pool in settings.pools.items():
        findings += check_model(name, pool)
    findings += [*check_engine(settings), *check_shared_memory(settings.transfer), *check_port(settings.api)]
    return [*findings, *await check_files(settings.files), *await check_batches(settings)]


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    version = platform.python_version()
    if sys.version_info >= _MIN_PYTHON:
        yield Finding("python", Grade.OK, version)
    else:
        yield Finding("python", Grade.ERROR, f"{version} is too old", "install Python 3.11 or newer")


async def check_redis(settings: RedisSettings) -> list[Finding]:
    """The server that would be used: its version and, where it runs, its settings."""
    if settings.url:
        return await _check_running_redis(settings)
    try:
        program = find_server()
    except RedisServerError as error:
        return [Finding("redis", Grade.ERROR, "no server found", str(error))]
    found = f"{program.kind} {program.version_text} from {program.origin} ({program.path}), started by `baton up`"
    socket_path = (Path(settings.run_dir) / "redis.sock").absolute()
    findings = [Finding("redis", Grade.OK, found)]
    if socket_path.exists():
        try:
            ask_redis(socket_path, "PING")
        except BatonError as error:
            text = f"{socket_path} is left over: {error}"
            return [*findings, Finding("redis", Grade.WARNING, text, "none needed: the next `baton up` replaces it")]
        findings += await _check_running_redis(msgspec.structs.replace(settings, url=f"unix://{socket_path}"))
    return findings


async def _check_running_redis(settings: RedisSettings) -> list[Finding]:
    try:
        connection = Connection(settings)
    except ConfigError as error:
        return [Finding("redis", Grade.ERROR, str(error), "correct redis.url (BATON_REDIS_URL)")]
    try:
        return judge(await look(connection))
    except BatonError as error:
        fix = "start it, or correct redis.url (BATON_REDIS_URL)"
        return [Finding("redis", Grade.ERROR, str(error), fix)]
    finally:
        await connection.close()


def check_model(name: str, pool: PoolSettings) -> Iterator[Finding]:
    """The model's files and its tokenizer, where they are on this machine; the hub is not asked."""
    from pipeline.tokenizer import Tokenizer, model_source  # here: it imports transformers (about 2 s)

    if pool.engine == "mock":
        yield Finding(f"model {name}", Grade.OK, "mock engine: no weights needed")
    else:
        yield _check_weights(name, pool, Path(model_source(pool.model)))
    if not pool.has_tokenizer:
        yield Finding(f"tokenizer {name}", Grade.OK, "none: token ids alone, /v1/chat/completions is refused")
        return
    source = pool.tokenizer_source
    if not Path(model_source(source)).is_dir():
        yield Finding(f"tokenizer {name}", Grade.OK, f"{source} comes from the hub at the first start")
        return
    try:
        tokenizer = Tokenizer.load(source)
    except BatonError as error:
        fix = f"set pools.{name}.tokenizer to a folder or hub id that has a tokenizer.json"
        yield Finding(f"tokenizer {name}", Grade.ERROR, str(error), fix)
        return
    if tokenizer.has_chat_template:
        yield Finding(f"tokenizer {name}", Grade.OK, f"{tokenizer.vocab_size} tokens, chat template")
    else:
        text = f"{tokenizer.vocab_size} tokens, no chat template: /v1/chat/completions is refused"
        yield Finding(
            f"tokenizer {name}", Grade.WARNING, text, "use /v1/completions or a model that was tuned for chat"
        )


def _check_weights(name: str, pool: PoolSettings, place: Path) -> Finding:
    if not place.is_dir():
        return Finding(f"model {name}", Grade.OK, f"{pool.model} comes from the hub at the first start of a worker")
    missing = [kind for kind in ("config.json", "*.safetensors") if not any(place.glob(kind))]
    if missing:
        fix = f"put the model's files there or correct pools.{name}.model"
        return Finding(f"model {name}", Grade.ERROR, f"{place} has no {' and no '.join(missing)}", fix)
    size_bytes = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return Finding(f"model {name}", Grade.OK, f"{place} ({size_bytes / 2**20:.1f} MiB of weights)")


def check_engine(settings: Settings) -> Iterator[Finding]:
    """PyTorch, if a pool needs it, and the threads that its engines may use."""
    if any(pool.engine == "torch" for pool in settings.pools.values()):
        try:
            yield Finding("torch", Grade.OK, importlib.metadata.version("torch"))
        except importlib.metadata.PackageNotFoundError:
            fix = "make up installs it; by hand: pip install 'baton-serve[torch]'"
            yield Finding("torch", Grade.ERROR, "PyTorch is not installed", fix)
    yield _check_threads(settings.engine)


def _check_threads(settings: EngineSettings) -> Finding:
    cpus, threads = len(os.sched_getaffinity(0)), settings.torch.threads
    text = f"{cpus} CPUs, {threads} threads an engine"
    if threads > cpus:
        return Finding("threads", Grade.WARNING, text, f"set engine.torch.threads to {cpus} or less")
    return Finding("threads", Grade.OK, text)


def check_shared_memory(settings: TransferSettings) -> Iterator[Finding]:
    """Room for the arena of one prefill worker."""
    folder = Path(settings.dir)
    if not os.access(folder, os.W_OK):
        yield Finding(
            "shared memory", Grade.ERROR, f"{folder} cannot be written to", "set transfer.dir to a tmpfs folder"
        )
        return
    free_bytes = shutil.disk_usage(folder).free
    text = f"{folder} has {free_bytes >> 20} MiB free, a prefill worker takes {settings.arena_bytes >> 20} MiB"
    if free_bytes < settings.arena_bytes:
        fix = "lower transfer.arena_bytes, or give it more (docker run --shm-size=1g)"
        yield Finding("shared memory", Grade.ERROR, text, fix)
    else:
        yield Finding("shared memory", Grade.OK, text)


def check_port(settings: ApiSettings) -> Iterator[Finding]:
    """Whether the API could listen."""
    try:
        free_port(settings.host, settings.port)
    except PortTaken as error:
        text, _, fix = str(error).partition(": ")
        yield Finding("port", Grade.WARNING, f"{text} (fine if Baton runs already)", fix)
    else:
        yield Finding("port", Grade.OK, f"{settings.port} on {settings.host} is free")


async def check_files(settings: FilesSettings) -> list[Finding]:
    """Whether the store of files can be written to and read."""
    fix = "correct files.url and files.storage_options (the API and batch workers must have the same)"
    try:
        storage = Storage(msgspec.structs.replace(settings, timeout_s=min(settings.timeout_s, _PATIENCE_S)))
        if is_folder(settings.url):
            return [_check_folder(settings.url.removeprefix("file://"), fix)]
        await _written_and_read(storage, f"doctor-{secrets.token_hex(8)}")
    except BatonError as error:
        return [Finding("files", Grade.ERROR, f"{settings.url}: {error}; {error.__cause__ or ''}".rstrip("; "), fix)]
    return [Finding("files", Grade.OK, f"{settings.url} takes files and gives them back")]


def _check_folder(path: str, fix: str) -> Finding:
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("files", Grade.ERROR, f"{folder}: {there} is no folder that can be written to", fix)
    made = "" if there == folder else ", made by the first file"
    free_mb = shutil.disk_usage(there).free >> 20
    return Finding("files", Grade.OK, f"{folder} ({free_mb:,} MiB free{made})")


async def _written_and_read(storage: Storage, place: str) -> None:
    writing = storage.writing(place)
    try:
        await writing.write(b"baton")
        await writing.close()
    finally:
        await writing.discard()
    await storage.read(place, 0, len(b"baton"))
    await storage.remove(place)


async def check_batches(settings: Settings) -> list[Finding]:
    """Whether batches wait that no worker will take. A Redis that is away was told by `check_redis`."""
    try:
        redis = running_redis(settings.redis)
        queue, connection = BatchQueue(redis, settings.rq), Connection(redis)
    except ConfigError as error:
        return [Finding("batches", Grade.ERROR, str(error), "correct rq.url (BATON_RQ_URL)")]
    except BatonError:
        return []
    try:
        await in_thread(_PATIENCE_S, queue.check)
        waiting = len(await BatchRecords.of(connection, settings.batches).unheld())
        workers = len(await in_thread(_PATIENCE_S, queue.workers))
    except ConfigError as error:
        return [Finding("batches", Grade.ERROR, str(error), "set rq.url (BATON_RQ_URL)")]
    except (BatonError, TimeoutError) as error:
        return [
            Finding(
                "batches", Grade.WARNING, f"not known: {error}", "start rq's Redis, or correct rq.url (BATON_RQ_URL)"
            )
        ]
    finally:
        queue.close()
        await connection.close()
    text = f"{waiting} that nobody has, {counted(workers, 'batch worker')}"
    if waiting and not workers:
        return [Finding("batches", Grade.WARNING, text, "start one: baton worker batch")]
    return [Finding("batches", Grade.OK, text)]


def _print(findings: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    marks = {Grade.OK: "[green]ok     [/]", Grade.WARNING: "[yellow]warning[/]", Grade.ERROR: "[red]error  [/]"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        console.print(marks[finding.grade], f"{finding.check:<{width}}", end="  ")
        console.print(finding.text, markup=False)
        for line in finding.fix.splitlines():
            console.print(" " * (width + 9), line if line.startswith(" ") else f"-> {line}", markup=False)
