"""A running Baton for tests and benchmarks: real Redis, real worker and API processes, all of them this test's own.

async with System(url, "engine.mock.decode_base_ms=1") as system:
    await system.worker("prefill")
    await system.worker("decode")
    async with system.client() as client: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx

from pipeline.client import PoolClient
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.ids import new_request_id
from pipeline.keys import PoolKeys
from pipeline.protocol import BackendInput, Request, SamplingOptions, StopConditions
from pipeline.settings_file import load_settings
from pipeline.stream import Ended, RequestStream, TokenChunk

POOL = "baton-tiny"
MOCK = (
    f"pools.{POOL}.engine=mock",
    "engine.mock.prefill_base_ms=1",
    "engine.mock.decode_base_ms=1",
    "engine.mock.decode_seq_ms=0",
)
START_LIMIT_S = 90.0
NEWER = ("files.",)  # settings that the version before does not know


class System:
    """Owns its processes: leaving the context ends every one of them, whatever state a test left it in."""

    def __init__(self, redis_url: str, *overrides: str, log_dir: Path | None = None) -> None:
        files = log_dir / "files" if log_dir else "memory://files"
        self.overrides = [
            f"redis.url={redis_url}",
            *MOCK,
            "transfer.verify=true",
            "log.level=debug",
            f"files.url={files}",
            *overrides,
        ]
        self.settings = load_settings(None, {}, self.overrides)
        self.keys = PoolKeys(POOL)
        self.connection = Connection(RedisSettings(url=redis_url))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._log_dir = log_dir

    async def __aenter__(self) -> System:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                await asyncio.to_thread(process.wait, 15)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        await self.connection.close()

    # -- processes ------------------------------------------------------------------------------------------------------

    def spawn(
        self, module: str, *arguments: str, code: Path | None = None, path: Path | None = None, gpu: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `python -m module`, of another version where `code` is a checkout of it; it dies with this process.

        `path`: a folder that Python looks into first. `gpu`: the only one that it sees.
        """
        known = [one for one in self.overrides if code is None or not one.startswith(NEWER)]
        sets = [part for override in known for part in ("--set", override)]
        command = [sys.executable, "-m", module, "--parent", str(os.getpid()), *sets, *arguments]
        name = "-".join([module, *(part for part in arguments if not part.startswith("-") and "=" not in part)])
        log = self._log_dir / f"{name}-{len(self.processes)}.log" if self._log_dir else Path(os.devnull)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if (first := code or path) is not None:
            environment["PYTHONPATH"] = str(first)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=code)
        self.processes.append(process)
        return process

    async def worker(
        self,
        stage: str,
        *overrides: str,
        app: str = "",
        code: Path | None = None,
        path: Path | None = None,
        gpu: str | None = None,
        pool: str = "",
    ) -> subprocess.Popen[bytes]:
        """Start one worker and wait until it is registered. `app`: the module of a stage of one's own. `pool`: which one, of several."""
        before = set(await self.alive(stage, pool))
        sets = [part for override in overrides for part in ("--set", override)]
        more = [*(("--app", app) if app else ()), *(("--pool", pool) if pool else ())]
        process = self.spawn("workers", stage, *sets, *more, code=code, path=path, gpu=gpu)
        await self.until(lambda: self._joined(stage, pool, before, process))
        return process

    async def _joined(self, stage: str, pool: str, before: set[str], process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{stage} worker ended with {process.returncode} while it started")
        return bool(set(await self.alive(stage, pool)) - before)

    async def alive(self, role: str, pool: str = "") -> list[str]:
        """Names of registered processes of a role."""
        key = PoolKeys(pool or POOL).alive(role)
        return [name.decode() for name in await self.connection.command("ZRANGE", key, 0, -1)]

    async def api(self, code: Path | None = None) -> str:
        """Start one API process and return its base URL once it is ready."""
        port = free_port()
        process = self.spawn("api", "--set", f"api.port={port}", code=code)
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient() as http:

            async def ready() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the API ended with {process.returncode} while it started")
                with contextlib.suppress(httpx.TransportError):
                    return (await http.get(f"{url}/ready")).status_code == 200
                return False

            await self.until(ready)
        return url

    # -- requests ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def client(self, name: str = "test-api", connection: Connection | None = None) -> AsyncIterator[PoolClient]:
        """A pool client in this process, as an API process has one."""
        settings = self.settings
        async with PoolClient(
            connection or self.connection, POOL, name, queue=settings.queue,
            router=settings.router, worker=settings.worker, silence_s=settings.api.silence_s,
        ) as client:  # fmt: skip
            yield client

    async def counter(self, name: str) -> int:
        """A pool counter as Redis has it now."""
        return int(await self.connection.command("HGET", self.keys.counters(), name) or 0)

    async def until(self, condition: Callable[[], object], limit_s: float = START_LIMIT_S) -> None:
        """Wait until an (async) condition holds; fails the test after `limit_s`."""
        async with asyncio.timeout(limit_s):
            while True:
                holds = condition()
                if asyncio.iscoroutine(holds):
                    holds = await holds
                if holds:
                    return
                await asyncio.sleep(0.02)

    async def rests(self) -> bool:
        """Whether a pool holds nothing that it should not hold when nothing is in flight."""
        return not await self.at_rest()

    async def logged(self, request_id: str, tokens: int, choice: int = 0) -> bool:
        """Whether the log of a choice holds at least this many tokens."""
        return int(await self.connection.command("STRLEN", self.keys.log(request_id, choice))) >= 4 * tokens

    async def at_rest(self) -> dict[str, object]:
        """What a pool still holds that it should not hold when nothing is in flight; empty is right."""
        command = self.connection.command
        left: dict[str, object] = {}
        for key in await command("KEYS", self.keys.root + "q:*"):
            if (length := await command("XLEN", key)) != 0:
                left[key.decode()] = length
        for request_key, (state, handle), life_s in await self._request_keys():
            if state in (b"queued", b"running") or handle is not None or life_s < 0:
                left[request_key] = (state, handle, life_s)
        for key in await command("KEYS", self.keys.held("*")):  # slots of API keys
            left[key.decode()] = sorted(await command("SMEMBERS", key))
        if deadlines := await command("ZCARD", self.keys.deadlines()):
            left["deadlines"] = deadlines
        counters = await command("HGETALL", self.keys.counters())
        pairs = zip(counters[0::2], counters[1::2], strict=True) if isinstance(counters, list) else counters.items()
        left.update({k.decode(): int(v) for k, v in pairs if k.startswith((b"waiting", b"tokens")) and int(v)})
        return left

    async def _request_keys(self) -> list[tuple[str, list[bytes | None], int]]:
        """Each stored request: its key, state and handle, and the seconds that it will be kept."""
        keys = [key.decode() for key in await self.connection.command("KEYS", self.keys.root + "req:*")]
        rows = [row for key in keys for row in (("HMGET", key, "state", "handle_id"), ("TTL", key))]
        answers = await self.connection.commands(*rows) if rows else []
        return list(zip(keys, answers[0::2], answers[1::2], strict=True))


def request(
    prompt: Sequence[int] | int, *, n: int = 1, max_tokens: int = 16, temperature: float = 0.0, seed: int | None = None,
    stop: list[str] | None = None, eos: list[int] | None = None,
) -> Request:  # fmt: skip
    """A request with the given prompt (token ids, or how many)."""
    request_id = new_request_id(POOL)
    ids = list(range(3, 3 + prompt)) if isinstance(prompt, int) else list(prompt)
    body = BackendInput(
        request_id=request_id,
        model=POOL,
        token_ids=ids,
        stop_conditions=StopConditions(max_tokens=max_tokens, stop=stop),
        sampling_options=SamplingOptions(n=n, temperature=temperature, seed=seed),
        eos_token_ids=eos or [],
    )
    return Request(id=request_id, kind="text_completion", created_s=0, input=body)


async def collect(
    stream: RequestStream, n: int = 1, pauses: list[float] | None = None
) -> tuple[list[list[int]], Ended]:
    """All tokens of a stream by choice; checks that each (choice, index) came once and in order. The longest wait for one joins
    `pauses`."""
    tokens: list[list[int]] = [[] for _ in range(n)]
    longest_s, last_s = 0.0, time.monotonic()
    async with stream:
        async for chunks in stream:
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
            for chunk in chunks:
                take(tokens, chunk)
    assert stream.ended is not None
    if pauses is not None:
        pauses.append(longest_s)
    return tokens, stream.ended


def take(tokens: list[list[int]], chunk: TokenChunk) -> None:
    """Add a chunk; it must follow what is there without gap or repetition."""
    assert chunk.index == len(tokens[chunk.choice]), (
        f"choice {chunk.choice}: {chunk.index} after {len(tokens[chunk.choice])}"
    )
    tokens[chunk.choice] += chunk.token_ids


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
