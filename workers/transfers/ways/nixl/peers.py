"""The agents of owners that a reader knows: each is met once, and forgotten when it is gone or when others are read more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.transfers.way import Unusable
from workers.transfers.ways.nixl.agent import Agent, Memory, Piece

MAX_PEERS = 16


@dataclass(slots=True, eq=False)
class Peer:
    """Another agent. `readings` have not ended; the owner has let some of them wait for too long where `is_silent`."""

    name: str
    metadata: bytes
    readings: set[asyncio.Future[None]] = field(default_factory=set)
    is_silent: bool = False


class Peers:
    """What `agent` knows of others. Every wait ends after `timeout_s`."""

    def __init__(self, agent: Agent, timeout_s: float) -> None:
        self._agent = agent
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}  # by name, the least recently read first
        self._meeting = asyncio.Lock()

    async def meet(self, name: str, metadata: bytes) -> Peer:
        """The agent of that name and metadata. Raises `Unusable`."""
        try:
            async with asyncio.timeout(self._timeout_s), self._meeting:
                known = self._peers.pop(name, None)
                if known is None or (known.metadata != metadata and not known.readings):
                    known = await self._new(name, metadata, known)
                self._peers[name] = known
                await self._forget_some()
        except TimeoutError:
            raise Unusable(f"NIXL did not answer for {self._timeout_s:g} s") from None
        if known.metadata != metadata:
            raise Unusable(f"{name}: another agent of that name is being read")
        return known

    async def read(
        self, peer: Peer, memory: Memory, pieces: Sequence[Piece], readings: list[asyncio.Future[None]]
    ) -> None:
        """Read from it. Raises `Unusable`. The read is added to `readings`: until it is done its memory is not ours."""
        if peer.is_silent:
            raise Unusable(f"{peer.name} has not answered for {self._timeout_s:g} s")
        reading = self._agent.read(peer.name, memory, pieces)
        readings.append(reading)
        peer.readings.add(reading)
        reading.add_done_callback(lambda _: self._end(peer, reading))
        await asyncio.wait([reading], timeout=self._timeout_s)
        if not reading.done():
            peer.is_silent = True
            raise Unusable(f"{peer.name} did not answer for {self._timeout_s:g} s")
        try:
            reading.result()
        except Unusable:
            await self.forget(peer)
            raise

    async def forget(self, peer: Peer) -> None:
        """It is gone, so the next handle of it meets it anew; while something is read from it, it stays."""
        if self._peers.get(peer.name) is peer and not peer.readings:
            del self._peers[peer.name]
            await self._part(peer.name)

    def _end(self, peer: Peer, reading: asyncio.Future[None]) -> None:
        peer.readings.discard(reading)
        peer.is_silent = peer.is_silent and bool(peer.readings)

    async def _new(self, name: str, metadata: bytes, old: Peer | None) -> Peer:
        if old is not None:
            await self._part(name)
        try:
            met = await self._agent.meet(metadata)
        except Exception as error:
            await self._part(name)  # what NIXL has read of it
            raise Unusable(f"{name}: NIXL does not take its metadata: {error!r}") from error
        if met != name:
            await self._part(met)
            self._peers.pop(met, None)
            raise Unusable(f"{name}: the metadata are those of another agent")
        return Peer(name, metadata)

    async def _forget_some(self) -> None:
        idle = [peer for peer in self._peers.values() if not peer.readings]
        for peer in idle[: max(0, len(self._peers) - MAX_PEERS)]:
            await self.forget(peer)

    async def _part(self, name: str) -> None:
        with contextlib.suppress(Exception):  # NIXL does not know it any more
            await self._agent.part(name)
