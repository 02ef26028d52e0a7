"""What must be true when the load has stopped and everything has come to rest. Each check gives sentences about what is broken."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec

from pipeline.backend import Backend
from pipeline.keys import GROUP
from pipeline.protocol import Log, Request
from pipeline.queue import ENDED_STATES, Standing
from pipeline.tokenizer import Tokenizer
from tests.chaos.fleet import LEASE_S, Fleet
from tests.chaos.journal import DONE, FAILED, HUNG, LEFT, Record
from tests.system import POOL

REST_S = 30.0
LOOK_AGAIN_S = LEASE_S / 4
LOST_AND_BACK_S = 3.0  # what a power cut loses, and the time until Redis is back
KINDS = ("lost", "duplicated", "hung", "wrong", "left over", "surprises")

# what may be, and is counted
CANCELLED = "cancelled, their API away past its lease"
FORGOTTEN = "gone, a power cut took them and their API died"
ENDED_ANEW = "ended anew, a power cut took an end that was told"
NEAR_TIE = "near ties after a recovery"
ALLOWED = (CANCELLED, FORGOTTEN, ENDED_ANEW, NEAR_TIE)


@dataclasses.dataclass
class Findings:
    """What is broken, by kind, and what is only counted."""

    broken: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {kind: [] for kind in KINDS})
    allowed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    states: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, kind: str, text: str) -> None:
        """Something is not as it must be."""
        self.broken[kind].append(text)

    @property
    def is_clean(self) -> bool:
        """Whether everything holds."""
        return not any(self.broken.values())


async def check_requests(fleet: Fleet, records: list[Record], findings: Findings) -> None:
    """Every accepted request ended once, and its client saw what its log says and what it would have got undisturbed."""
    texts = Texts(fleet)
    for record in records:
        judge_outcome(record, fleet, findings)
        standing = await fleet.queue.attach(record.id, watch=False) if record.id else None
        if standing is not None:
            await judge_log(fleet, record, standing, texts, findings, is_exact=fleet.engine == "mock")
        elif record.id and record.outcome in (DONE, LEFT) and not was_cut_off(record.began_s, fleet):
            findings.add("lost", f"{record.id}: {record.outcome} for its client, but Redis does not know it any more")


def was_cut_off(moment_s: float, fleet: Fleet) -> bool:
    """Whether what happened then was within what a power cut took from Redis."""
    return any(0 < cut_s - moment_s < LOST_AND_BACK_S for cut_s in fleet.redis.power_cuts_s)


def lost_its_end(record: Record, fleet: Fleet) -> bool:
    """Whether a power cut took the end of a request that its client saw; a slow reader sees it long after it was."""
    if record.how != "slow":
        return was_cut_off(record.ended_s, fleet)
    return any(record.began_s < cut_s < record.ended_s + LOST_AND_BACK_S for cut_s in fleet.redis.power_cuts_s)


def judge_outcome(record: Record, fleet: Fleet, findings: Findings) -> None:
    """As its client saw it."""
    name = record.id or f"(no id, {record.how} of shape {record.shape.number})"
    if record.outcome == HUNG:
        findings.add("hung", f"{name}: {record.reason}")
    elif record.outcome == FAILED and (excuse := excuse_of(record, fleet)):
        findings.allowed[excuse] += 1
    elif record.outcome == FAILED:
        findings.add("lost", f"{name} ({record.how}): {record.reason}")
    if record.repeated:
        findings.add("duplicated", f"{name}: {record.repeated} times a token that its client had")


def excuse_of(record: Record, fleet: Fleet) -> str:
    """Why a request may have failed for its client; empty if it may not."""
    if record.api is None or record.api.harmed_s < record.began_s:
        return ""
    if "cancelled" in record.reason:  # by the other ones; its client is told when its API is back
        return CANCELLED
    # with `appendfsync everysec` it lived for a moment in its API only, and that died in this moment
    return FORGOTTEN if "request_not_found" in record.reason and was_cut_off(record.began_s, fleet) else ""


async def judge_log(
    fleet: Fleet, record: Record, standing: Standing, texts: Texts, findings: Findings, *, is_exact: bool
) -> None:
    """As Redis has it."""
    findings.states[standing.state] += 1
    expected = record.shape.tokens
    if standing.state not in ENDED_STATES:
        findings.add("hung", f"{record.id}: still {standing.state} in {standing.stage}")
    elif standing.state == "cancelled" and record.outcome == DONE and lost_its_end(record, fleet):
        findings.allowed[ENDED_ANEW] += 1
    elif standing.state != "done" and record.outcome == DONE:
        findings.add(
            "lost", f"{record.id}: its client got all of it, but it ended as {standing.state}: {standing.reason}"
        )
    elif standing.state not in ("done", "cancelled"):
        findings.add("lost", f"{record.id}: {standing.state}: {standing.reason} ({record.outcome} for its client)")
    log = standing.log.tokens
    is_whole = standing.state == "done"
    is_right = log == expected if is_whole else all(a == b[: len(a)] for a, b in zip(log, expected, strict=True))
    if is_right and not record.wrong:
        return
    sees_its_log = not record.wrong or record.seen in (log, await texts.of(record.id, standing.log))
    if sees_its_log and not is_exact:
        findings.allowed[NEAR_TIE] += 1
        return
    what = record.wrong or f"its log is other than undisturbed: {[len(tokens) for tokens in log]} tokens"
    findings.add("wrong", f"{record.id} ({record.how}, {record.recoveries} recoveries, {standing.state}): {what}")


class Texts:
    """The text of a request's log, as its API would have made it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tokenizer: Tokenizer | None = None

    async def of(self, request_id: str, log: Log) -> list[str]:
        """One text a choice."""
        self._tokenizer = self._tokenizer or Tokenizer.load(POOL)
        body = await self._fleet.system.connection.command("HGET", self._fleet.system.keys.request(request_id), "body")
        request = msgspec.msgpack.decode(body, type=Request).input
        backends = [Backend(self._tokenizer, request) for _ in log.tokens]
        return [
            backend.push(tokens, reason).delta + backend.finish()
            for backend, tokens, reason in zip(backends, log.tokens, log.finished, strict=True)
        ]


async def wait_for_rest(fleet: Fleet) -> None:
    """Everything is settled, or `REST_S` have passed and the checks say what is not."""

    async def rests() -> bool:
        return all(member.is_whole for member in fleet.members) and not (
            await left_in_redis(fleet) or await left_in_workers(fleet)
        )

    with contextlib.suppress(TimeoutError):
        await fleet.system.until(rests, REST_S)


async def check_rest(fleet: Fleet, findings: Findings) -> None:
    """Nothing in flight, so nothing is held: not in Redis, not in the workers, not in shared memory."""
    for left in (await left_in_redis(fleet), await left_in_workers(fleet)):
        for what, value in left.items():
            findings.add("left over", f"{what}: {value}")
    counters = await counters_of(fleet)
    ended = sum(value for name, value in counters.items() if name.startswith("ended:"))
    if counters.get("admitted", 0) != ended:
        findings.add("left over", f"{counters.get('admitted', 0)} requests were admitted, and {ended} ended")


async def left_in_redis(fleet: Fleet) -> dict[str, Any]:
    """Tasks, deliveries, requests, handles, deadlines, delayed tasks, and counters that say otherwise than the streams."""
    command, keys = fleet.system.connection.command, fleet.system.keys
    left: dict[str, Any] = dict(await fleet.system.at_rest())
    counted: collections.Counter[str] = collections.Counter()
    for key in (key.decode() for key in await command("KEYS", keys.root + "*")):
        name = key.removeprefix(keys.root)
        if name.startswith(("req:", "log:")):
            continue
        kind = await command("TYPE", key)
        if kind == b"zset" and not name.startswith("alive:") and (members := await command("ZCARD", key)):
            left[name] = members
        if name.startswith("q:"):
            if pending := await pending_of(fleet, key):
                left[f"{name} pending"] = pending
            counted += await counted_on(fleet, key)
    kept = {
        k: v for k, v in (await counters_of(fleet)).items() if k.startswith(("waiting:", "tokens:", "running:")) and v
    }
    if kept != counted:
        left["counters of what waits and runs"] = f"{kept}, but the streams say {dict(counted)}"
    for role in ("prefill", "decode"):
        names = {member.name for member in fleet.of(role)}
        if names != (alive := set(await fleet.system.alive(role))):
            left[f"alive:{role}"] = f"{sorted(alive)}, but {sorted(names)} live"
    if (apis := len(await fleet.system.alive("api"))) != len(fleet.of("api")) + 1:
        left["alive:api"] = f"{apis}, but {len(fleet.of('api'))} and the driver's client live"
    return left


async def pending_of(fleet: Fleet, lane_key: str) -> int:
    """Deliveries of a lane that nobody has settled."""
    command = fleet.system.connection.command
    if not await command("XINFO", "GROUPS", lane_key):
        return 0
    return int((await command("XPENDING", lane_key, GROUP))["pending"])


async def counted_on(fleet: Fleet, lane_key: str) -> collections.Counter[str]:
    """What the counters of a lane should say, from its entries and the requests behind them."""
    command, keys = fleet.system.connection.command, fleet.system.keys
    _, stage, lane = lane_key.removeprefix(keys.root).split(":", 2)
    found: collections.Counter[str] = collections.Counter()
    for entry, row in await command("XRANGE", lane_key, "-", "+"):
        request = keys.request(row[b"id"].decode())
        state, priority, n, *place = await command("HMGET", request, "state", "priority", "n", "stage", "lane", "entry")
        if place != [stage.encode(), lane.encode(), entry]:
            continue
        if state == b"queued":
            found[f"waiting:{stage}:{lane}"] += 1
            found[f"tokens:{stage}:{lane}"] += int(row[b"tokens"])
        elif state == b"running":
            found[f"running:{stage}:{priority.decode()}"] += int(n) if stage == "decode" else 1
    return found


async def counters_of(fleet: Fleet) -> dict[str, int]:
    """The pool's counters."""
    rows = await fleet.system.connection.command("HGETALL", fleet.system.keys.counters())
    pairs = rows.items() if isinstance(rows, dict) else zip(rows[0::2], rows[1::2], strict=True)
    return {name.decode(): int(value) for name, value in pairs}


async def left_in_workers(fleet: Fleet) -> dict[str, Any]:
    """What the workers say that they still have, and arenas without a living owner."""
    left: dict[str, Any] = {}
    for member in fleet.of("prefill", "decode"):
        info = await fleet.system.connection.command("HGET", fleet.system.keys.worker(member.name), "info")
        stats = json.loads(info)["stats"] if info else {}
        for figure in ("running", "waiting", "handles_exported", "handle_bytes"):
            if stats.get(figure):
                left[f"{member.place} {figure}"] = stats[figure]
    arenas = len(list(fleet.blocks_dir.iterdir()))
    if arenas > len(fleet.of("prefill")):
        left["arenas"] = f"{arenas} for {len(fleet.of('prefill'))} prefill workers"
    return left


async def check_departure(fleet: Fleet, findings: Findings) -> None:
    """After every member has left in good order: no process, no shared memory, no name."""
    engines = [pid for member in fleet.of("prefill", "decode") for pid in member.engines()]
    await fleet.leave()
    await asyncio.sleep(LOOK_AGAIN_S)
    for pid in engines:
        if Path(f"/proc/{pid}").exists():
            findings.add("left over", f"engine {pid} outlived its worker")
    for path in fleet.blocks_dir.iterdir():
        findings.add("left over", f"shared memory {path.name}")
    for role in ("prefill", "decode"):
        for name in await fleet.system.alive(role):
            findings.add("left over", f"{name} has left and is still listed")


def check_processes(fleet: Fleet, findings: Findings) -> None:
    """Nothing ended that was not asked to, and nobody's log holds an exception."""
    for surprise in fleet.surprises:
        findings.add("surprises", surprise)
    for path in sorted((fleet.folder / "logs").iterdir()):
        text = path.read_text(errors="replace")
        if "Traceback (most recent call last)" in text:
            last = text.split("Traceback (most recent call last)", 1)[1].splitlines()
            reason = next((line for line in last if line and not line.startswith(" ")), "?")
            findings.add("surprises", f"{path.name} holds an exception: {reason[:200]}")
