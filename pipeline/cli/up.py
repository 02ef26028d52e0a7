"""`baton up`: everything on one machine, in order, each step said aloud.

1. The port is free, or nothing is started.
2. Redis: the one of the settings, else a private one of this folder.
3. Who may ask: an address that others reach needs API keys, or a word that it needs none.
4. The API and the workers, each a process of its own; a child that ends before all are ready ends everything.
5. Ready: Redis lists every worker, rq every batch worker, and the API answers `/ready`.
   With --autoscale prefill and decode workers come and go as `[autoscale]` says (`pipeline/cli/supervisor.py`): here then as many as
   there are at least, which may be none.
6. One sample answer through the real endpoint, and a line to paste.
7. Serve. A process that ends is started again, later each time.
8. Ctrl-C or SIGTERM: the API first, so that streams finish; then the workers; then Redis. A second one kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from pipeline.api_keys import check_exposure, needs_key
from pipeline.cli.autoscale import drain_all, run_all, supervisors
from pipeline.cli.children import Child, ChildEnded, Restarts, Terminal
from pipeline.cli.openai_stream import stream_chat
from pipeline.cli.options import Given, api_headers, api_url
from pipeline.cli.stopping import until_stopped
from pipeline.cli.supervisor import PoolSupervisor
from pipeline.cli.worker_processes import Worker, WorkerPlace, WorkerProcesses
from pipeline.config import PoolSettings, Settings
from pipeline.connection import Connection
from pipeline.errors import BatonError, RedisUnavailable
from pipeline.exits import PortTaken
from pipeline.key_store import KeyStore, read_keys_file
from pipeline.keys import PoolKeys
from pipeline.processes import ending
from pipeline.queue import BATCH, EMBED, STAGES
from pipeline.redis_server import RedisServer, RedisServerError, ServerProgram, find_server
from pipeline.scaling.policy import check
from pipeline.settings_file import load_settings
from pipeline.snapshot import take_snapshot

SAMPLE_QUESTION = "What is Baton?"
READY_LIMIT_S = 600.0  # a first start may download a model
_LOOK_S = 0.1


class Counts(NamedTuple):
    """Workers of each pool; of `embed` where the pool makes embeddings; of `batch` for all pools together."""

    prefill: int
    decode: int
    embed: int = 1
    batch: int = 0


async def run_up(source: Given, counts: Counts, *, with_sample: bool, autoscale: bool = False) -> int:
    """Runs until it is told to stop; returns the exit code. Errors are printed, since children print until the end."""
    settings = source.settings()
    port = free_port(settings.api.host, settings.api.port)
    settings = msgspec.structs.replace(settings, api=msgspec.structs.replace(settings.api, port=port))
    if autoscale:
        check(settings.autoscale)
        counts = counts._replace(prefill=0, decode=0)
    return await Up(source, settings, counts, with_sample=with_sample, autoscale=autoscale).run()


def free_port(host: str, port: int) -> int:
    """The port if nobody listens there, a free one for 0; raises PortTaken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise PortTaken(
            f"port {port} on {host} cannot be used ({error.strerror}): stop the program that has it, "
            "or choose another with --set api.port=8001 or BATON_API_PORT=8001"
        ) from error


def worker_places(pools: Mapping[str, PoolSettings], counts: Counts) -> list[WorkerPlace]:
    """The workers of each pool, then those of all pools; labels name the pool where there are several."""
    prefix = {pool: f"{pool}." if len(pools) > 1 else "" for pool in pools}
    wanted = [
        (pool, stage, prefix[pool])
        for pool, settings in pools.items()
        for stage in (*STAGES, EMBED)
        if stage != EMBED or settings.embeddings
    ]
    return [
        WorkerPlace(pool, stage, number, f"{before}{stage}-{number}")
        for pool, stage, before in (*wanted, ("", BATCH, ""))
        for number in range(getattr(counts, stage))
    ]


class Up:
    """One run of everything. See the module's docstring."""

    def __init__(
        self, source: Given, settings: Settings, counts: Counts, *, with_sample: bool, autoscale: bool = False
    ) -> None:
        self._source = source
        self._settings = settings
        self._with_sample = with_sample
        places = worker_places(settings.pools, counts)
        self._terminal = Terminal(["baton", "api", *(place.label for place in places)])
        self._redis: RedisServer | None = None
        self._url = settings.redis.url
        self._api = self._child("api", lambda: self._module("api"))
        self._processes = WorkerProcesses(
            self._module,
            self._connection,
            self._terminal,
            self._say,
            max_attempts=settings.worker.max_attempts,
            batches=settings.batches,
        )
        self._workers = [self._processes.make(place) for place in places]
        self._autoscales = autoscale
        self._supervisors: list[PoolSupervisor] = []
        self._stack = contextlib.AsyncExitStack()
        self._is_ready = False
        self._needs_key = False

    async def run(self) -> int:
        """Starts, serves, stops; returns the exit code."""
        return await until_stopped(self._serve(), self._drain, self._kill, self._say)

    # -- start ------------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._start(group)
        except BaseExceptionGroup as errors:
            purposeful = errors.subgroup(BatonError)
            if purposeful is None:
                raise
            raise _first(purposeful) from None

    async def _start(self, group: asyncio.TaskGroup) -> None:
        """Starts everything; the tasks that watch over it stay in `group`."""
        started_s = time.monotonic()
        await self._start_redis(group)
        await self._check_keys()
        self._say(f"starting the API and {self._workers_in_words()} (PyTorch and the model take a moment)")
        for child in (self._api, *(worker.child for worker in self._workers)):
            await child.start()
            group.create_task(self._keep_running(child))
        if self._autoscales:
            await self._scale(group)
        await self._wait_ready()
        self._say(f"ready after {time.monotonic() - started_s:.1f} s: {self._base_url}")
        if self._with_sample:
            await self._stream_sample()
        self._say_hints()
        self._is_ready = True

    async def _start_redis(self, group: asyncio.TaskGroup) -> None:
        if self._url:
            self._say("using the Redis of the settings")
            async with self._connection() as connection:
                await connection.command("PING")
            return
        settings = self._settings.redis
        program = find_server()
        self._redis = RedisServer.start(Path(settings.run_dir), program=program, appendfsync=settings.appendfsync)
        self._url = self._redis.url
        self._say(f"starting {program.kind} {program.version_text} (from {program.origin}) in {settings.run_dir}/")
        await asyncio.to_thread(self._redis.wait_ready)
        group.create_task(self._keep_redis_running(self._redis))

    async def _scale(self, group: asyncio.TaskGroup) -> None:
        """Let workers come and go from now on. Raises PoolTaken."""
        connection = await self._stack.enter_async_context(self._connection())
        self._supervisors = supervisors(
            self._settings, list(self._settings.pools), connection, self._processes, self._say
        )
        for supervisor in self._supervisors:
            await supervisor.take()
        group.create_task(run_all(self._supervisors))

    async def _check_keys(self) -> None:
        """Raises ConfigError where the API would listen for others and nobody had said who may ask it."""
        api = self._settings.api
        async with self._connection() as connection:
            has_keys = bool(read_keys_file(api.keys_file) or (await KeyStore(connection).read()).keys)
        check_exposure(api.auth, api.host, has_keys=has_keys)
        self._needs_key = needs_key(api.auth, api.host, has_keys=has_keys)

    async def _wait_ready(self) -> None:
        """Until Redis and rq list every worker that was started and the API says that it is ready."""
        try:
            async with asyncio.timeout(READY_LIMIT_S), self._connection() as connection, self._http() as http:
                for worker in self._workers:
                    is_batch = worker.place.stage == BATCH
                    await (self._listed_by_rq(worker) if is_batch else _registered(connection, worker))
                    self._terminal.line(worker.place.label, "registered")
                for supervisor in self._supervisors:
                    await supervisor.is_ready.wait()
                await _answers_ok(http, "/ready")
        except TimeoutError:
            raise ChildEnded(f"not everything was ready within {READY_LIMIT_S:g} s: see the lines above") from None

    async def _listed_by_rq(self, worker: Worker) -> None:
        from pipeline.batches.jobs import BatchQueue  # here: while the engines start, there is time to import rq

        batches = BatchQueue(msgspec.structs.replace(self._settings.redis, url=self._url), self._settings.rq)
        try:
            while True:
                with contextlib.suppress(RedisUnavailable):
                    if worker.name in await asyncio.to_thread(batches.workers):
                        return
                await asyncio.sleep(_LOOK_S)
        finally:
            batches.close()

    async def _stream_sample(self) -> None:
        model, pool = next(iter(self._settings.pools.items()))
        if not pool.has_tokenizer:
            return
        if self._needs_key and not api_headers():
            self._say("no sample answer: the API needs a key, and BATON_API_KEY holds none")
            return
        body = {"model": model, "messages": [{"role": "user", "content": SAMPLE_QUESTION}], "max_tokens": 200}
        self._say(f'asking {model}: "{SAMPLE_QUESTION}"')
        started_s = time.monotonic()
        first_s = None
        async with self._http() as http:
            with self._terminal.held():
                self._terminal.write("\n  ")
                async for delta in stream_chat(http, body):
                    first_s = first_s or time.monotonic() - started_s
                    self._terminal.write(delta.text)
                self._terminal.write("\n\n")
        self._say(f"first token after {1000 * (first_s or 0):.0f} ms")

    def _say_hints(self) -> None:
        model, pool = next(iter(self._settings.pools.items()))
        body: dict[str, object] = {"model": model, "stream": True}
        if pool.has_tokenizer:
            route, other_way = "chat/completions", f" (or: {self._chat_command()})"
            body |= {"messages": [{"role": "user", "content": "Tell me a story."}]}
        else:
            route, other_way = "completions", ""
            body |= {"prompt": [1, 2, 3], "return_token_ids": True}
        self._say(f"try it from another terminal{other_way}:")
        key = ' -H "Authorization: Bearer $BATON_API_KEY"' if self._needs_key else ""
        line = f"curl -N {self._base_url}/v1/{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
        self._terminal.write(f"\n  {line}\n\n")
        self._say("serving; Ctrl-C stops everything in order")

    def _chat_command(self) -> str:
        """`baton chat` as it reaches this API from another terminal of this folder."""
        program = "baton" if shutil.which("baton") else os.path.relpath(Path(sysconfig.get_path("scripts"), "baton"))
        there = load_settings(self._source.path, os.environ, []).api
        is_found = (there.host, there.port) == (self._settings.api.host, self._settings.api.port)
        return f"{program} chat" if is_found else f"{program} chat --url {self._base_url}"

    # -- run --------------------------------------------------------------------------------------------------------------

    async def _keep_running(self, child: Child) -> None:
        restarts = Restarts()
        while True:
            started_s = time.monotonic()
            code = await child.ended()
            if not self._is_ready:
                raise ChildEnded(f"{child.name} {ending(code)} before it was ready: see its lines above")
            delay_s = restarts.delay_s(time.monotonic() - started_s)
            self._say(f"{child.name} {ending(code)}: starting it again in {delay_s:g} s")
            for worker in self._workers:
                if worker.child is child:
                    await self._processes.give_back_tasks_of(worker)
            await asyncio.sleep(delay_s)
            await self._start_again(child, restarts)

    async def _start_again(self, child: Child, restarts: Restarts) -> None:
        while True:
            try:
                return await child.start()
            except OSError as error:  # no memory, too many processes
                delay_s = restarts.delay_s(0)
                self._say(f"{child.name} cannot be started ({error.strerror}): trying again in {delay_s:g} s")
                await asyncio.sleep(delay_s)

    async def _keep_redis_running(self, server: RedisServer) -> None:
        restarts = Restarts()
        while True:
            started_s = time.monotonic()
            await _process_ended(server.process.pid)
            server.stop()  # it has ended: this frees the folder
            delay_s = restarts.delay_s(time.monotonic() - started_s)
            self._say(f"Redis {ending(server.process.returncode)}: starting it again in {delay_s:g} s; requests wait")
            await asyncio.sleep(delay_s)
            server = await self._redis_again(server.program, restarts)

    async def _redis_again(self, program: ServerProgram, restarts: Restarts) -> RedisServer:
        """One that answers, or has just ended once more."""
        settings = self._settings.redis
        while True:
            try:
                self._redis = server = RedisServer.start(
                    Path(settings.run_dir), program=program, appendfsync=settings.appendfsync
                )
            except (RedisServerError, OSError) as error:
                delay_s = restarts.delay_s(0)
                self._say(f"Redis cannot be started ({error}): trying again in {delay_s:g} s; requests wait")
                await asyncio.sleep(delay_s)
                continue
            with contextlib.suppress(RedisServerError):  # that it ended is seen by who watches it
                await asyncio.to_thread(server.wait_ready)
            return server

    # -- stop -------------------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        self._say("killing everything")
        for child in (self._api, *(worker.child for worker in self._workers)):
            child.kill()
        for supervisor in self._supervisors:
            supervisor.kill()

    async def _drain(self) -> None:
        settings = self._settings
        if self._api.is_running:
            self._say(f"stopping: streams may finish for {settings.api.shutdown_grace_s:g} s (Ctrl-C again kills)")
        await self._api.stop(settings.api.shutdown_grace_s + 5)
        others = (worker.child.stop(settings.worker.drain_s + 5) for worker in self._workers)
        await asyncio.gather(drain_all(self._supervisors), *others)
        await self._stack.aclose()
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
        self._say("stopped")

    # -- pieces -----------------------------------------------------------------------------------------------------------

    @property
    def _base_url(self) -> str:
        return api_url(self._settings.api)

    def _say(self, text: str) -> None:
        self._terminal.line("baton", text)

    def _workers_in_words(self) -> str:
        beside = " and workers as [autoscale] says" if self._autoscales else ""
        return f"{len(self._workers)} workers{beside}"

    def _child(self, name: str, command: Callable[[], list[str]]) -> Child:
        return Child(name, command, {**os.environ, "PYTHONUNBUFFERED": "1"}, self._terminal)

    def _module(self, *words: str) -> list[str]:
        chosen = ["--set", f"redis.url={self._url}", "--set", f"api.port={self._settings.api.port}"]
        return [sys.executable, "-m", *words, *self._source.arguments(), *(chosen if self._redis else chosen[2:])]

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._base_url, headers=api_headers(), timeout=httpx.Timeout(60.0, connect=5.0), trust_env=False
        )

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        connection = Connection(msgspec.structs.replace(self._settings.redis, url=self._url))
        try:
            yield connection
        finally:
            await connection.close()


async def _registered(connection: Connection, worker: Worker) -> None:
    """Returns when Redis lists the worker; a Redis that does not answer yet is waited for, as workers do."""
    keys = PoolKeys(worker.place.pool)
    while True:
        with contextlib.suppress(RedisUnavailable):
            snapshot = await take_snapshot(connection, keys)
            if worker.name in snapshot.workers.get(worker.place.stage, {}):
                return
        await asyncio.sleep(_LOOK_S)


async def _answers_ok(http: httpx.AsyncClient, path: str) -> None:
    """Returns when a GET of `path` is answered with 200."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await http.get(path)).status_code == httpx.codes.OK:
                return
        await asyncio.sleep(_LOOK_S)


async def _process_ended(pid: int) -> None:
    """Returns when a child of this process ended; it is not waited for, so that its exit code stays to be read."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _first(errors: BaseExceptionGroup[BatonError]) -> BatonError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
