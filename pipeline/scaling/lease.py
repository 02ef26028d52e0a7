"""Who scales a pool: one process at a time, by a lease in Redis that it renews.

The lease names its process, so who finds it held by a process of this machine that has ended (`kill -9`) takes it at once; of
another machine nothing is known until it runs out. Whoever holds it also writes down the workers that it has started: they end with
it, and the next one hands back at once what they held.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import msgspec

from pipeline.connection import Connection, Script
from pipeline.errors import BatonError
from pipeline.keys import PoolKeys
from pipeline.protocol import UNREADABLE
from pipeline.queue import STAGES
from pipeline.scaling.policy import Decision
from pipeline.snapshot import text_pairs

LEASE_S = 10.0
RENEW_S = LEASE_S / 4

_lead = Script("lead")
_desire = Script("desire")


class PoolTaken(BatonError):
    """Another process scales this pool."""

    code = "pool_taken"


class Holder(msgspec.Struct, frozen=True):
    """A process. `machine` tells what its `pid` is a number of: a boot of a host, and there a namespace of processes."""

    machine: str
    pid: int
    began: str  # process ids come again
    host: str

    @staticmethod
    def this_process() -> Holder:
        """Who we are."""
        return Holder(_machine(), os.getpid(), _began(os.getpid()), socket.gethostname())

    @property
    def has_ended(self) -> bool:
        """Whether that is certain."""
        return bool(self.began) and self.machine == _machine() and _began(self.pid) != self.began


class ScalerLease:
    """The lease of one pool for this process."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self._connection = connection
        self._keys = PoolKeys(pool)
        self._pool = pool
        self._me = msgspec.json.encode(Holder.this_process())

    async def take(self) -> None:
        """Take it, or renew it. Raises PoolTaken naming who has it."""
        ended = b""
        while held := await self._ask(LEASE_S, ended):
            holder = _holder(held)
            if holder is None or not holder.has_ended:
                raise PoolTaken(f"pool {self._pool} is scaled by {_named(holder)}: stop that, or leave the pool to it")
            ended = held

    async def give_up(self) -> None:
        """Let others have it. Raises RedisUnavailable."""
        await self._ask(0)

    async def tell(self, decision: Decision, when_ms: int) -> None:
        """Write down what was decided; a change is an event. Raises PoolTaken."""
        rows: list[str | int] = []
        for stage in STAGES:
            said = decision.stage(stage)
            if said.before is not None and said.desired is not None:
                rows += (stage, said.before, said.desired, said.why)
        if await self._connection.call(_desire, self._keys.root, self._me, when_ms, *rows) == 0:
            await self.take()  # it has run out, and nobody or somebody has taken it since

    async def orphans(self) -> dict[str, str]:
        """Workers (name -> stage) that have ended together with who started them. Those of other machines are forgotten: their leases
        run out. Those of a process of this machine that lives are its own: it lets them go, or the next one finds that it has ended.
        Raises RedisUnavailable."""
        crew = text_pairs(await self._connection.command("HGETALL", self._keys.crew()))
        found = {}
        for name, value in crew.items():
            stage, _, holder = value.partition(" ")
            known = _holder(holder.encode())
            if known is None or known.machine != _machine():
                await self.leave(name)
            elif known.has_ended:
                found[name] = stage
        return found

    async def join(self, worker: str, stage: str) -> None:
        """A worker that ends with this process. Raises RedisUnavailable."""
        await self._connection.command("HSET", self._keys.crew(), worker, f"{stage} {self._me.decode()}")

    async def leave(self, *workers: str) -> None:
        """These have ended, and nothing is held by them. Raises RedisUnavailable."""
        await self._connection.command("HDEL", self._keys.crew(), *workers)

    async def _ask(self, lease_s: float, ended: bytes = b"") -> bytes:
        answer = await self._connection.call(_lead, self._keys.root, self._me, int(lease_s * 1000), ended)
        assert isinstance(answer, bytes)
        return answer


def _holder(held: bytes) -> Holder | None:
    try:
        return msgspec.json.decode(held, type=Holder)
    except UNREADABLE:
        return None


def _named(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "another process"


def _machine() -> str:
    """Empty where nothing tells."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where there is none, or one that has ended and waits for its parent."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
