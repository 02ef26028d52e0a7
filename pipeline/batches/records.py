"""What Redis knows of batches. Whoever works on one holds it by a lease and names its epoch: a worker that was taken for dead changes
nothing more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec

from pipeline.batches.record import ENDED, FOLLOWS, BatchRecord
from pipeline.config import BatchesSettings
from pipeline.connection import Arg, Connection, Script
from pipeline.dated import all_found, found
from pipeline.errors import IdempotencyConflict
from pipeline.keys import (
    BATCHES_ROOT,
    batch_done,
    batch_lease,
    batch_list,
    batch_parts,
    batch_record,
    batch_spent,
    batches_open,
    batches_untidy,
    batches_untold,
)  # fmt: skip

KEY_STANDS_S = 86_400  # an idempotency key, for the batch that was made under it
AT_ONCE = 1000


class Fenced(Exception):
    """Somebody else works on the batch now, or it has ended: stop, and write nothing more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """A batch in the hands of one worker."""

    batch_id: str
    worker: str
    epoch: int


def holder_name(worker: str, nonce: str) -> str:
    """The name by which one of a batch worker's processes holds a batch."""
    return f"{worker}/{nonce}"


@dataclasses.dataclass(frozen=True, slots=True)
class NotTaken:
    """Why a batch was not taken up."""

    why: Literal["held", "ended", "gone"]
    by: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a batch's results that is kept at `place`. `lines`: their numbers, from 0; `spent`: the requests that answered them."""

    place: str
    nbytes: int
    lines: Sequence[int]
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    spent: Sequence[str] = ()


class BatchRecords:
    """The records of all batches. Every method raises RedisUnavailable. `tells`: whether somebody is to be told of the end of each."""

    def __init__(self, connection: Connection, *, lease_s: float, keep_s: float, tells: bool = False) -> None:
        self._connection = connection
        self._lease_ms = int(lease_s * 1000)
        self._keep_s = int(keep_s)
        self._tells = tells
        self._scripts = {name: Script(f"{name}_batch") for name in ("put", "take", "hold", "free", "turn")}
        self._put_part = Script("put_part")

    @classmethod
    def of(cls, connection: Connection, settings: BatchesSettings) -> BatchRecords:
        """As the settings have it: whoever may end a batch must know whether somebody is told."""
        return cls(
            connection, lease_s=settings.lease_s, keep_s=settings.keep_s, tells=bool(settings.webhook_url)
        )  # fmt: skip

    async def put(self, record: BatchRecord, idempotency_key: str = "", digest: str = "") -> str:
        """Make a batch known; answers its id, or that of the first one of its key. Raises QueueFull where Redis has no memory for it, and
        IdempotencyConflict where the first one of the key has another digest."""
        what, batch_id = await self._connection.call(
            self._scripts["put"], BATCHES_ROOT, record.id, record.owner, idempotency_key, KEY_STANDS_S, digest,
            *_flat(msgspec.to_builtins(record)), waits_for_memory=False,
        )  # fmt: skip
        if what == b"conflict":
            raise IdempotencyConflict(
                f"the idempotency key already stands for {batch_id.decode()}, which was made of another body: send this one under a key of "
                "its own",
                param="Idempotency-Key",
            )
        return str(batch_id.decode())

    async def find(self, batch_id: str) -> BatchRecord | None:
        """What is known of a batch."""
        return await found(self._connection, BatchRecord, batch_record(batch_id))

    async def page(self, owner: str, after: str, most: int) -> list[BatchRecord]:
        """Up to `most` batches of an owner behind the id `after` (empty: from the start), the newest first."""
        found: list[BatchRecord] = []
        begin, key = f"({after}" if after else "+", batch_list(owner)
        while len(found) < most:
            count = min(most - len(found), AT_ONCE)
            names = await self._connection.command("ZREVRANGEBYLEX", key, begin, "-", "LIMIT", 0, count)
            ids = [name.decode() for name in names]
            some = await self.known(ids)
            await self._delist(key, sorted({*ids} - {one.id for one in some}))
            found += some
            if len(ids) < count:
                break
            begin = f"({ids[-1]}"
        return found

    async def _delist(self, key: str, ids: Sequence[str]) -> None:
        """Take those from a list whose time is over; not those that only this version cannot read."""
        if not ids:
            return
        there = await self._connection.commands(*[("EXISTS", batch_record(one)) for one in ids])
        gone = [one for one, is_there in zip(ids, there, strict=True) if not is_there]
        if gone:
            await self._connection.command("ZREM", key, *gone)

    async def known(self, ids: Collection[str]) -> list[BatchRecord]:
        """The records of those that there are."""
        return await all_found(self._connection, BatchRecord, [batch_record(one) for one in ids])

    async def unheld(self) -> list[str]:
        """Batches that have not ended and that nobody works on."""
        ids = [name.decode() for name in await self._connection.command("ZRANGE", batches_open(), 0, -1)]
        if not ids:
            return []
        held = await self._connection.commands(*[("EXISTS", batch_lease(one)) for one in ids])
        return [one for one, is_held in zip(ids, held, strict=True) if not is_held]

    async def ended(self, ids: Sequence[str]) -> list[str]:
        """Those that have ended, or that there are no more, whether or not this version can read what is known of them."""
        if not ids:
            return []
        places = await self._connection.command("ZMSCORE", batches_open(), *ids)
        return [one for one, place in zip(ids, places, strict=True) if place is None]

    async def turn(self, record: BatchRecord, state: str, hold: Hold | None = None, **fields: Arg) -> str:
        """Bring a batch to a state; answers the one that it is in, which is another where that may not follow. Raises Fenced."""
        if self._tells and state in ENDED:  # before it has: nobody who dies between the two leaves one untold
            await self._connection.command("ZADD", batches_untold(), 0, record.id)
        before = " ".join(old for old, new in FOLLOWS.items() if state in new)
        answer, now = await self._connection.call(
            self._scripts["turn"], BATCHES_ROOT, record.id, "" if hold is None else hold.epoch, f" {before} ", state,
            int(state in ENDED), self._keep_s, *_flat(fields),
        )  # fmt: skip
        if answer in (b"fenced", b"gone"):
            raise Fenced(record.id)
        return str(now.decode())

    async def untold(self, now_s: float, most: int) -> list[str]:
        """Batches of whose end somebody is to be told now, or which are about to end."""
        names = await self._connection.command("ZRANGEBYSCORE", batches_untold(), "-inf", int(now_s), "LIMIT", 0, most)
        return [name.decode() for name in names]

    async def tell_at(self, batch_id: str, at_s: float) -> None:
        """Not before."""
        await self._connection.command("ZADD", batches_untold(), "XX", int(at_s), batch_id)

    async def told(self, batch_id: str) -> None:
        """It has been."""
        await self._connection.command("ZREM", batches_untold(), batch_id)

    # -- a worker's side ----------------------------------------------------------------------------------------------

    async def take(self, batch_id: str, worker: str) -> Hold | NotTaken:
        """Take up a batch that nobody works on. `worker`: a name that nobody has or had."""
        answer = await self._connection.call(self._scripts["take"], BATCHES_ROOT, batch_id, worker, self._lease_ms)
        what, *more = [part.decode() for part in answer]
        if what == "taken":
            return Hold(batch_id, worker, int(more[0]))
        return NotTaken(what, *more)

    async def hold(self, hold: Hold, answered: tuple[int, int] | None = None) -> str:
        """Go on holding it; answers its state. `answered`: lines that succeeded and that failed, kept or not. Raises Fenced."""
        counts = {} if answered is None else dict(zip(("answered", "answered_failed"), answered, strict=True))
        answer = await self._connection.call(
            self._scripts["hold"], BATCHES_ROOT, hold.batch_id, hold.worker, hold.epoch, self._lease_ms, *_flat(counts)
        )
        if answer[0] == b"fenced":
            raise Fenced(hold.batch_id)
        return str(answer[1].decode())

    async def let_go(self, hold: Hold) -> None:
        """Somebody else may take it up at once."""
        await self._connection.call(self._scripts["free"], BATCHES_ROOT, hold.batch_id, hold.worker)

    async def evict(self, worker: str) -> list[str]:
        """Let go what a worker held that has died; answers which batches."""
        ids = [name.decode() for name in await self._connection.command("ZRANGE", batches_open(), 0, -1)]
        holders = await self._connection.command("MGET", *map(batch_lease, ids)) if ids else []
        held = [
            Hold(batch_id, holder.decode(), 0)
            for batch_id, holder in zip(ids, holders, strict=True)
            if holder is not None and holder.startswith(holder_name(worker, "").encode())
        ]
        for one in held:
            await self.let_go(one)
        return [one.batch_id for one in held]

    async def put_part(self, hold: Hold, part: Part) -> None:
        """Make a part known whose bytes are all there. Raises Fenced."""
        answer = await self._connection.call(
            self._put_part, BATCHES_ROOT, hold.batch_id, hold.epoch, f"{part.nbytes} {part.place}", part.completed, part.failed,
            part.prompt_tokens, part.cached_tokens, part.completion_tokens, len(part.lines), *part.lines, *part.spent,
        )  # fmt: skip
        if answer == b"fenced":
            raise Fenced(hold.batch_id)

    async def parts(self, batch_id: str) -> list[tuple[str, int]]:
        """Place and bytes of its parts, in the order in which they were kept."""
        kept = await self._connection.command("LRANGE", batch_parts(batch_id), 0, -1)
        named = [part.decode().partition(" ") for part in kept]
        return [(place, int(nbytes)) for nbytes, _, place in named]

    async def spent(self, batch_id: str) -> list[str]:
        """Requests that nobody needs: their answers are in parts."""
        return [one.decode() for one in await self._connection.command("SMEMBERS", batch_spent(batch_id))]

    async def forget_spent(self, batch_id: str, request_ids: Sequence[str]) -> None:
        """These are erased."""
        if request_ids:
            await self._connection.command("SREM", batch_spent(batch_id), *request_ids)

    async def untidy(self) -> list[str]:
        """Batches that have parts, or requests that nobody needs, whether or not they have ended."""
        return [one.decode() for one in await self._connection.command("SMEMBERS", batches_untidy())]

    async def tidied(self, batch_id: str) -> None:
        """Nothing is left of a batch that has ended but its record."""
        await self._connection.command("DEL", batch_parts(batch_id), batch_spent(batch_id))
        await self._connection.command("SREM", batches_untidy(), batch_id)

    async def done(self, batch_id: str) -> Done:
        """The lines that are in its parts."""
        return Done(await self._connection.command("GET", batch_done(batch_id)) or b"")


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A set of lines, as Redis keeps it: a bit each."""

    bits: bytes

    def __contains__(self, line: int) -> bool:
        byte, bit = divmod(line, 8)
        return byte < len(self.bits) and bool(self.bits[byte] >> (7 - bit) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self.bits, "big").bit_count()


def _flat(fields: dict[str, Any]) -> list[Arg]:
    return list(itertools.chain.from_iterable(fields.items()))
