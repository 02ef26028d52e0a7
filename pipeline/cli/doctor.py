"""`baton doctor`: looks at this machine and the settings as `baton up` would, and says what to do about what it finds.

Each check is a function that returns findings; none changes anything. An error is what would keep Baton from working,
a warning what will hurt later.
"""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from pipeline.cli.exits import Exit, PortTaken
from pipeline.cli.options import Given
from pipeline.cli.up import free_port
from pipeline.config import ApiSettings, EngineSettings, PoolSettings, RedisSettings, Settings, TransferSettings
from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.redis_server import MIN_VERSION, RedisServerError, ask_redis, find_server

_MIN_PYTHON = (3, 11)
_MIN_PUBSUB_BUFFER_BYTES = 8_388_608  # a slow API process is cut off when this much waits for it


class Grade(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Finding(NamedTuple):
    """One thing that was looked at. `fix` says what to do and is empty when all is well."""

    check: str
    grade: Grade
    text: str
    fix: str = ""


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
    return findings


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
    connection = Connection(settings)
    try:
        server = _fields(await connection.command("INFO", "server"))
        wanted = ("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "client-output-buffer-limit")
        values = {name: _config_value(await connection.command("CONFIG", "GET", name)) for name in wanted}
    except BatonError as error:
        fix = "start it, or correct redis.url (BATON_REDIS_URL)"
        return [Finding("redis", Grade.ERROR, str(error), fix)]
    finally:
        await connection.close()
    return [check_redis_version(server), *check_redis_settings(values)]


def check_redis_version(server: dict[str, str]) -> Finding:
    """`server` is the section of that name of INFO."""
    kind = "valkey" if server.get("server_name") == "valkey" else "redis"
    version = server.get("valkey_version" if kind == "valkey" else "redis_version", "0")
    needed = MIN_VERSION[kind]
    if tuple(map(int, version.split(".")[:2])) < needed:
        text = f"{kind} {version} runs, but {'.'.join(map(str, needed))} is needed"
        return Finding("redis version", Grade.ERROR, text, "upgrade the server")
    return Finding("redis version", Grade.OK, f"{kind} {version} runs")


def check_redis_settings(values: dict[str, str | None]) -> Iterator[Finding]:
    """`values` of CONFIG GET; None for what the server does not tell (managed servers)."""
    policy, appendonly, fsync = values["maxmemory-policy"], values["appendonly"], values["appendfsync"]
    if policy is None or appendonly is None:
        yield Finding("redis settings", Grade.WARNING, "the server does not tell its settings", "ask whoever runs it")
        return
    if policy == "noeviction":
        yield Finding("redis eviction", Grade.OK, "noeviction: nothing that was accepted is thrown away")
    else:
        fix = "redis-cli config set maxmemory-policy noeviction"
        yield Finding("redis eviction", Grade.ERROR, f"{policy} may throw accepted requests away", fix)
    if appendonly == "yes":
        lost = "nothing" if fsync == "always" else "its last second"
        yield Finding("redis durability", Grade.OK, f"AOF on, appendfsync {fsync}: a power cut may cost {lost}")
    else:
        fix = "redis-cli config set appendonly yes"
        yield Finding("redis durability", Grade.WARNING, "AOF is off: a restart forgets accepted requests", fix)
    limit = int(values["maxmemory"] or 0)
    text = f"{limit / 2**20:.0f} MiB" if limit else "no limit"
    yield Finding("redis memory", Grade.OK, f"maxmemory: {text}")
    yield _check_pubsub_buffer(values["client-output-buffer-limit"] or "")


def _check_pubsub_buffer(limits: str) -> Finding:
    """`limits` is "normal 0 0 0 slave ... pubsub <hard> <soft> <seconds>"; 0 is no limit."""
    words = limits.split()
    hard_bytes, soft_bytes = (int(word) for word in words[words.index("pubsub") + 1 :][:2]) if words else (0, 0)
    if all(limit == 0 or limit >= _MIN_PUBSUB_BUFFER_BYTES for limit in (hard_bytes, soft_bytes)):
        return Finding("redis pub/sub buffer", Grade.OK, f"{hard_bytes >> 20} MiB hard, {soft_bytes >> 20} MiB soft")
    text = f"pubsub {hard_bytes} {soft_bytes} bytes: a busy API process would be cut off and read from the token logs"
    fix = "redis-cli config set client-output-buffer-limit 'pubsub 32mb 8mb 60'"
    return Finding("redis pub/sub buffer", Grade.WARNING, text, fix)


def check_model(name: str, pool: PoolSettings) -> Iterator[Finding]:
    """The model's files and its tokenizer, where they are on this machine; the hub is not asked."""
    from pipeline.tokenizer import Tokenizer, model_source  # here: it imports transformers (about 2 s)

    if pool.engine == "mock":
        yield Finding(f"model {name}", Grade.OK, "mock engine: no weights needed")
    else:
        yield _check_weights(name, pool, Path(model_source(pool.model)))
    source = pool.tokenizer or pool.model
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


def _print(findings: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    marks = {Grade.OK: "[green]ok     [/]", Grade.WARNING: "[yellow]warning[/]", Grade.ERROR: "[red]error  [/]"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        console.print(marks[finding.grade], f"{finding.check:<{width}}", end="  ")
        console.print(finding.text, markup=False)
        for line in finding.fix.splitlines():
            console.print(" " * (width + 9), line if line.startswith(" ") else f"-> {line}", markup=False)


def _fields(info: bytes | str | dict[object, object]) -> dict[str, str]:
    if isinstance(info, dict):  # some client versions parse INFO
        return {str(name): str(value) for name, value in info.items()}
    text = info.decode() if isinstance(info, bytes) else info
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _config_value(answer: object) -> str | None:
    """The value of CONFIG GET with one name: a list of two, or a map in some client versions; None when it is withheld."""
    pairs = list(answer.values()) if isinstance(answer, dict) else list(answer)[1:] if isinstance(answer, list) else []
    if not pairs:
        return None
    return pairs[0].decode() if isinstance(pairs[0], bytes) else str(pairs[0])
