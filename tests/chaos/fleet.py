"""The system under test: one Redis, workers and API processes, each behind a proxy of its own, and who starts them again.

A member is a place in the fleet (the second decode worker). Its process may die; the next one there has a new name, the same
proxy and, for an API, the same port. Harm done to a member is noted with its time: clients of an API that was harmed may see
their connection die, others may not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from pipeline.api_keys import digest_of
from pipeline.client import PoolClient
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import BatonError
from pipeline.queue import PoolQueue
from tests.chaos.server import Server
from tests.e2e.processes import children
from tests.proxy import RedisProxy, Trap
from tests.system import POOL, System, free_port
from tests.with_vllm.settings import VLLM

LEASE_S = 2.0
CLIENTS_KEY = "baton-sk-of-all-clients-over-http"  # their requests take slots, which are to be free at rest
SHOWS_KEY = {"authorization": f"Bearer {CLIENTS_KEY}"}
SETTINGS = (
    f"worker.lease_s={LEASE_S}", "worker.sweep_s=0.25", "worker.drain_s=1", "worker.max_attempts=50", "api.silence_s=1",
    "api.headers_after_s=30", "api.stream_buffer_items=64", "queue.deadline_s=180", "queue.result_ttl_s=7200",
    "redis.timeout_s=3", "transfer.arena_bytes=33554432", "log.level=info",
)  # fmt: skip
ENGINES = {
    "mock": (
        "worker.stall_s=1.5", "engine.mock.prefill_base_ms=5", "engine.mock.decode_base_ms=15",
        "engine.mock.max_num_seqs=12",  # so that tasks wait for decode, and handles with them
    ),
    "torch": (f"pools.{POOL}.engine=torch", "worker.stall_s=6", "engine.torch.max_num_seqs=12"),
    "vllm": (*VLLM, "worker.stall_s=20", "engine.vllm.max_num_seqs=12"),
}  # fmt: skip
START_LIMIT_S = {"mock": 30.0, "torch": 30.0, "vllm": 120.0}  # vLLM imports and loads for 20 s and more
PLACES = (("prefill", 2), ("decode", 2), ("api", 2))
LOOK_S = 0.05


@dataclasses.dataclass(eq=False)
class Member:
    """A place for one process, and the process that has it now."""

    role: str
    number: int
    proxy: RedisProxy
    port: int = 0
    name: str = ""  # of a worker; an API makes its own
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False
    is_frozen: bool = False
    is_told: bool = True  # whether its next death is said to Redis by whoever starts it again
    may_end: bool = False
    harmed_s: float = -1.0  # when it was last harmed or came back from it

    @property
    def place(self) -> str:
        """Its name in the report."""
        return f"{self.role}-{self.number}"

    @property
    def url(self) -> str:
        """Where an API listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_whole(self) -> bool:
        """Whether it serves, and nothing is being done to it."""
        return self.is_ready and not self.is_frozen and not self.may_end

    def engines(self) -> list[int]:
        """Process ids of a worker's engine."""
        assert self.process is not None
        with contextlib.suppress(OSError):
            return children(self.process)
        return []


class Fleet:
    """Use as `async with Fleet(...) as fleet`: everything is up then. Leaving ends every process."""

    def __init__(self, folder: Path, engine: str, rng: random.Random) -> None:
        self.folder = folder
        self.engine = engine
        self.surprises: list[str] = []  # processes that ended although nobody asked them to
        self._rng = rng
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Fleet:
        self.redis = await self._stack.enter_async_context(Server(self.folder))
        self.blocks_dir = self.folder / "blocks"
        for name in ("logs", "blocks"):
            (self.folder / name).mkdir()
        self.driver = await self._proxy()  # of the driver's own clients and its supervisor
        self.members = [
            Member(role, number, await self._proxy(), free_port() if role == "api" else 0)
            for role, count in PLACES
            for number in range(count)
        ]
        keys_file = self.folder / "keys.toml"  # which outlives Redis
        keys_file.write_text(f'[clients]\ndigest = "{digest_of(CLIENTS_KEY)}"\nconcurrent_requests = 10000\n')
        overrides = (
            *SETTINGS, f"transfer.dir={self.blocks_dir}", f"api.keys_file={keys_file}", *ENGINES[self.engine]
        )  # fmt: skip
        self.system = await self._stack.enter_async_context(
            System(self.redis.url, *overrides, log_dir=self.folder / "logs")
        )
        self.connection = Connection(RedisSettings(url=self.driver.url, timeout_s=3))
        self._stack.push_async_callback(self.connection.close)
        self.queue = PoolQueue(self.connection, POOL)
        for member in self.members:
            self._start(member)
        self._keeping = asyncio.create_task(self._keep_running())
        self._stack.push_async_callback(self._stop_keeping)
        await self.system.until(lambda: all(member.is_ready for member in self.members))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _proxy(self) -> RedisProxy:
        return await self._stack.enter_async_context(RedisProxy(self.redis.socket_path, self.folder))

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[PoolClient]:
        """A client of the pool in this process, behind the driver's proxy."""
        settings = self.system.settings
        async with PoolClient(
            self.connection, POOL, f"driver-{secrets.token_hex(3)}", queue=settings.queue,
            router=settings.router, worker=settings.worker, silence_s=settings.api.silence_s, buffer_items=64,
        ) as client:  # fmt: skip
            yield client

    # -- members ----------------------------------------------------------------------------------------------------------

    def of(self, *roles: str) -> list[Member]:
        """Members of these roles."""
        return [member for member in self.members if member.role in roles]

    async def whole(self, *roles: str) -> Member:
        """A member of these roles to which nothing is being done, once there is one."""
        limit_s = START_LIMIT_S[self.engine]
        give_up_s = time.monotonic() + limit_s
        while not (able := [member for member in self.of(*roles) if member.is_whole]):
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"no {' or '.join(roles)} serves for {limit_s:g} s: see the logs of {self.folder}")
            await asyncio.sleep(LOOK_S)
        return self._rng.choice(able)

    def arm_everywhere(self, trap: Trap) -> Trap:
        """Wait for a call of any process, the driver included."""
        for proxy in (self.driver, *(member.proxy for member in self.members)):
            proxy.arm(trap)
        return trap

    def disarm_everywhere(self, trap: Trap) -> None:
        """The reverse."""
        for proxy in (self.driver, *(member.proxy for member in self.members)):
            proxy.disarm(trap)

    def _start(self, member: Member) -> None:
        redis = ("--set", f"redis.url={member.proxy.url}")
        member.is_ready = member.is_frozen = member.may_end = False
        member.is_told = self._rng.random() < 0.5
        if member.role == "api":
            member.process = self.system.spawn("api", *redis, "--set", f"api.port={member.port}")
            return
        member.name = f"{member.place}-{secrets.token_hex(3)}"
        member.process = self.system.spawn("workers", member.role, *redis, "--name", member.name)

    async def _keep_running(self) -> None:
        """Starts again what has ended, as `baton up` does, and notes who serves."""
        async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
            while True:
                for member in self.members:
                    if member.process is not None and (code := member.process.poll()) is not None:
                        await self._replace(member, code)
                    elif not member.is_ready and not member.is_frozen:
                        member.is_ready = await self._serves(member, http)
                await asyncio.sleep(LOOK_S)

    async def _replace(self, member: Member, code: int) -> None:
        if member.is_ready and not member.may_end:
            self.surprises.append(f"{member.place} ({member.name}) ended with {code} although nothing was done to it")
        if member.role != "api" and member.is_told:
            with contextlib.suppress(BatonError):
                await self.queue.evict(member.role, member.name, max_attempts=50)
        member.harmed_s = time.monotonic()
        self._start(member)

    async def _serves(self, member: Member, http: httpx.AsyncClient) -> bool:
        with contextlib.suppress(BatonError, httpx.HTTPError):
            if member.role == "api":
                return (await http.get(f"{member.url}/ready")).status_code == httpx.codes.OK
            return member.name in await self.system.alive(member.role)
        return False

    async def _stop_keeping(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)

    async def leave(self) -> None:
        """Every member leaves in good order; those that do not are a surprise."""
        await self._stop_keeping()
        for member in self.members:
            self.drain(member)
        for member in self.members:
            assert member.process is not None
            try:
                code: int | str = await asyncio.to_thread(member.process.wait, 40)
            except subprocess.TimeoutExpired:
                code = "nothing within 40 s"
            if code != 0:
                self.surprises.append(f"{member.place} ({member.name}) was asked to leave and ended with {code}")

    # -- harm -------------------------------------------------------------------------------------------------------------

    def kill(self, member: Member, *, is_told: bool | None = None) -> None:
        """kill -9; `is_told`: its supervisor sees it, or (a host that is gone) only its leases run out."""
        member.is_told = member.is_told if is_told is None else is_told
        self._harm(member)
        member.may_end = True
        assert member.process is not None
        member.process.kill()

    def drain(self, member: Member) -> None:
        """SIGTERM: it leaves in good order."""
        self._harm(member)
        member.is_told, member.may_end = False, True
        assert member.process is not None
        member.process.terminate()

    def kill_engine(self, member: Member) -> None:
        """kill -9 of the child of a worker."""
        self._harm(member)
        self._signal(member.engines(), signal.SIGKILL)

    def stop_engine(self, member: Member) -> list[int]:
        """SIGSTOP of the child; its worker replaces it. Returns what `let_engine_go` takes."""
        self._harm(member)
        pids = member.engines()
        self._signal(pids, signal.SIGSTOP)
        return pids

    async def let_engine_go(self, pids: list[int]) -> None:
        """A stopped engine that has nothing to do any more is not missed, so nobody replaced it: it goes on."""
        await asyncio.sleep(4 * self.system.settings.worker.stall_s)
        self._signal(pids, signal.SIGCONT)

    async def freeze(self, member: Member, what: str, seconds: float) -> None:
        """SIGSTOP for a time: "parent", "child" or "both"."""
        assert member.process is not None
        pids = [] if what == "child" else [member.process.pid]
        pids += [] if what == "parent" else member.engines()
        member.is_frozen = True
        self._harm(member)
        self._signal(pids, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._signal(pids, signal.SIGCONT)
            self._harm(member)
            member.is_frozen = False

    def _harm(self, member: Member) -> None:
        member.harmed_s = time.monotonic()

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
