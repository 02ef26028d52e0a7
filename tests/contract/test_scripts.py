"""Every script against every state of a request: called once, called twice, and with its first reply lost.

The answer is the same each time, and so is what Redis holds afterwards. The table of answers stands in `pipeline/README.md`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.errors import KeyBusy, QueueFull
from pipeline.keys import PoolKeys
from pipeline.protocol import (
    BackendInput,
    FinishReason,
    KVHandle,
    LLMEngineOutput,
    Log,
    Request,
    SamplingOptions,
    StopConditions,
)
from pipeline.queue import Admission, Delivery, LaneLook, Limits, PoolQueue, StepItem
from pipeline.snapshot import text_pairs
from tests.proxy import RedisProxy, Trap

POOL, ID, API = "p", "p-request", "api-1"
PREFILLER, DECODER, OTHER = "prefill-1", "decode-1", "decode-2"
LIMITS = Limits(max_waiting_tasks=3, max_waiting_tokens=1000, deadline_s=60, result_ttl_s=60)
REQUEST = Request(
    id=ID, kind="text_completion", created_s=0,
    input=BackendInput(
        request_id=ID, model=POOL, token_ids=[1, 2, 3], stop_conditions=StopConditions(max_tokens=9),
        sampling_options=SamplingOptions(n=2),
    ),
    owner="key-1",
)  # fmt: skip
ADMISSION = Admission(REQUEST, "prefill", "default", API, linger_s=0.0)
HANDLE = KVHandle(
    id="handle-1", request_id=ID, owner=PREFILLER, transfer="shm", layout="x", num_tokens=3, num_blocks=1, nbytes=8
)
FIRST = [LLMEngineOutput(ID, choice, 0, [10 + choice]) for choice in (0, 1)]


class Story:
    """A pool with one request, brought from state to state. Deliveries are kept, so that scripts can be called as their owner."""

    def __init__(self, connection: Connection) -> None:
        self.queue = PoolQueue(connection, POOL)
        self.delivery = Delivery(ID, 1, "prefill", "default", b"", b"", 0, 0, API, 3, log=None)  # type: ignore[arg-type]

    async def admit(self) -> str:
        return await self.queue.admit(ADMISSION, LIMITS)

    async def claim(self, stage: str, worker: str, nonce: str = "nonce") -> Delivery | None:
        return await self.queue.claim(
            stage,
            worker,
            [LaneLook(lane, 9) for lane in (f"@{worker}", "high", "default", "low")],
            total_blocks=9,
            block_size=16,
            overtake_ms=1000,
            nonce=nonce,
        )

    async def handover(self) -> Any:
        return await self.queue.handover(self.delivery, PREFILLER, FIRST, HANDLE, cached_tokens=1)

    async def park(self, worker: str) -> str:
        return await self.queue.hand_back(self.delivery, worker, counts=False, max_attempts=3, why="test")


async def reach(story: Story, state: str) -> None:
    """Bring the request into a state by the calls that lead there."""
    path = PATHS[state]
    for step in path:
        await step(story)


async def _admit(story: Story) -> None:
    await story.admit()


async def _claim_prefill(story: Story) -> None:
    delivery = await story.claim("prefill", PREFILLER, "first")
    assert delivery is not None
    story.delivery = delivery


async def _park_prefill(story: Story) -> None:
    assert await story.park(PREFILLER) == "parked"


async def _hand_over(story: Story) -> None:
    await story.handover()


async def _claim_decode(story: Story) -> None:
    delivery = await story.claim("decode", DECODER, "second")
    assert delivery is not None
    story.delivery = delivery


async def _fetch(story: Story) -> None:
    await story.queue.fetched(story.delivery, DECODER)


async def _park_decode(story: Story) -> None:
    assert await story.park(DECODER) == "parked"


async def _take_over(story: Story) -> None:
    await story.claim("decode", OTHER, "third")


def _end(state: str) -> Callable[[Story], Awaitable[None]]:
    async def end(story: Story) -> None:
        if state == "done":
            last = [LLMEngineOutput(ID, choice, 1, [30 + choice], FinishReason.EOS) for choice in (0, 1)]
            await story.queue.step(DECODER, [StepItem(ID, API, story.delivery.epoch, output) for output in last])
        await story.queue.end(ID, state, "test", worker=DECODER, epoch=story.delivery.epoch)

    return end


async def _cancel(story: Story) -> None:
    await story.queue.cancel(ID, "test")


async def _bury(story: Story) -> None:
    await story.queue.hand_back(story.delivery, DECODER, counts=True, max_attempts=0, why="test")


_DECODING = (_admit, _claim_prefill, _hand_over, _claim_decode)
PATHS: dict[str, tuple[Callable[[Story], Awaitable[None]], ...]] = {
    "unknown": (),
    "queued prefill": (_admit,),
    "running prefill": (_admit, _claim_prefill),
    "parked prefill": (_admit, _claim_prefill, _park_prefill),
    "queued decode": (_admit, _claim_prefill, _hand_over),
    "fetching": _DECODING,
    "decoding": (*_DECODING, _fetch),
    "parked decode": (*_DECODING, _fetch, _park_decode),
    "taken over": (*_DECODING, _fetch, _park_decode, _take_over),
    "done": (*_DECODING, _end("done")),
    "failed": (*_DECODING, _end("failed")),
    "cancelled waiting": (_admit, _cancel),
    "cancelled running": (_admit, _claim_prefill, _cancel),
    "expired": (*_DECODING, _end("expired")),
    "dead": (*_DECODING, _bury),
}


async def _step(story: Story) -> str:
    output = LLMEngineOutput(ID, 0, 1, [20])
    last = LLMEngineOutput(ID, 1, 1, [21, 22], FinishReason.LENGTH)
    beyond = LLMEngineOutput(ID, 0, 50, [23])
    epoch = story.delivery.epoch
    items = [StepItem(ID, API, epoch, item) for item in (output, last, beyond)]
    return " ".join(verdict.name.lower() for verdict in await story.queue.step(_owner(story), items))


async def _claimed(story: Story, stage: str) -> str:
    delivery = await story.claim(stage, OTHER)
    return f"epoch {delivery.epoch}, {len(delivery.log.tokens[0])} token(s)" if delivery else "nothing"


async def _handed(story: Story) -> str:
    verdict, where = await story.handover()
    return f"{verdict.name.lower()} {where}".strip()


async def _admitted(story: Story) -> str:
    try:
        return "stored" if await story.admit() == ID else "duplicate"
    except QueueFull:
        return "full"


async def _admitted_beside(story: Story) -> str:
    """Another request of the same API key, which may have one at a time."""
    other = msgspec.structs.replace(REQUEST, id="p-other")
    try:
        await story.queue.admit(Admission(other, "prefill", "default", API), dataclasses.replace(LIMITS, max_held=1))
    except KeyBusy:
        return "busy"
    return "stored"


async def _restored(story: Story) -> str:
    """Its client was sent two tokens of each choice."""
    sent = Log(tokens=[[10, 20], [11, 21]], finished=[None, None])
    restored = await story.queue.restore(ADMISSION, LIMITS, sent)
    standing = await story.queue.attach(ID, watch=False)
    assert standing is not None
    return f"{restored.state}: {standing.state} in {standing.stage}, {len(standing.log.tokens[0])} token(s)"


async def _kept(story: Story) -> str:
    return (await story.queue.keep_prompt(_owner(story), ID, story.delivery.epoch, b"records" * 9)).name.lower()


async def _attached(story: Story) -> str:
    standing = await story.queue.attach(ID, watch=True)
    return f"{standing.state}, {len(standing.log.tokens[0])} token(s)" if standing else "unknown"


async def _stands(story: Story) -> str:
    (brief,) = await story.queue.standing([ID], with_results=True)
    return f"{brief.state} in {brief.stage}" if brief else "unknown"


async def _swept(story: Story) -> str:
    """The only script whose second call may answer less: what was to be done is done."""
    done = await story.queue.sweep("sweeper", interval_s=60, lease_s=60, max_attempts=3)
    return (
        ", ".join(f"{count} {name}" for name, count in done.items() if count) if any(done.values()) else "nothing to do"
    )


async def _evicted(story: Story) -> str:
    """Counts what it did, so its second call may answer less."""
    role = story.delivery.stage
    return f"{await story.queue.evict(role, _owner(story), max_attempts=3)} given back"


async def _ended(story: Story, state: str, worker: str, epoch: int | None, result: bytes = b"") -> str:
    return " ".join(await story.queue.end(ID, state, "asked", worker=worker, epoch=epoch, result=result)).strip()


def _owner(story: Story) -> str:
    return PREFILLER if story.delivery.stage == "prefill" else DECODER


async def _renewed(story: Story) -> str:
    mine = await story.queue.renew("decode", _owner(story), b"", 30, [(ID, story.delivery.epoch)])
    return "still mine" if mine == [True] else "lost"


async def _wanted(story: Story) -> str:
    return "wanted" if await story.queue.wanted({HANDLE.id: ID}) else "free it"


async def _dropped(story: Story) -> str:
    state = await story.queue.drop(ID, "1-1")
    return f"kept, it is {state}" if state else "gone"


async def _erased(story: Story) -> str:
    what, state = await story.queue.erase(ID)
    return f"{what}, it is {state}" if state else what


SCRIPTS: dict[str, Callable[[Story], Awaitable[str]]] = {
    "admit": _admitted,
    "admit another": _admitted_beside,
    "restore": _restored,
    "claim prefill": lambda story: _claimed(story, "prefill"),
    "claim decode": lambda story: _claimed(story, "decode"),
    "handover": _handed,
    "prompt": _kept,
    "fetched": lambda story: _name(story.queue.fetched(story.delivery, _owner(story))),
    "step": _step,
    "end (owner)": lambda story: _ended(story, "done", _owner(story), story.delivery.epoch, b"kept"),
    "cancel": lambda story: _ended(story, "cancelled", "", None),
    "attach": _attached,
    "standing": _stands,
    "linger": lambda story: story.queue.linger(ID, 60),
    "renew": _renewed,
    "handback": lambda story: story.queue.hand_back(
        story.delivery, _owner(story), counts=False, max_attempts=3, why="test"
    ),
    "wanted": _wanted,
    "sweep": _swept,
    "evict": _evicted,
    "purge prefill": lambda story: _purged(story, "prefill"),
    "purge decode": lambda story: _purged(story, "decode"),
    "drop": _dropped,
    "erase": _erased,
    "leave": lambda story: _said(story.queue.leave("decode", OTHER)),
}


async def _purged(story: Story, stage: str) -> str:
    count, cursor = await story.queue.purge(stage, "default", cursor="-", last="+", nonce="nonce")
    return f"{count} ended" if not cursor else f"{count} ended, and more"


async def _name(call: Awaitable[Any]) -> str:
    return str((await call).name.lower())


async def _said(call: Awaitable[None]) -> str:
    await call
    return "forgotten"


async def holds(connection: Connection) -> dict[str, Any]:
    """What Redis holds, without times and stream ids."""
    dump: dict[str, Any] = {}
    for raw in sorted(await connection.command("KEYS", "*")):
        key, kind = raw.decode(), (await connection.command("TYPE", raw)).decode()
        if kind == "hash":
            rows = await connection.command("HGETALL", raw)
            pairs = rows.items() if isinstance(rows, dict) else zip(rows[0::2], rows[1::2], strict=True)
            timed = re.compile(rb"t_|entry$|deadline$|last$|hold_until$")
            dump[key] = {name: value for name, value in pairs if not timed.match(name)}
            if len(dump[key].get(b"epoch", b"")) > 9:  # of a restored request: made from the time
                dump[key][b"epoch"] = b"restored"
        elif kind == "stream":
            dump[key] = (
                await connection.command("XLEN", raw),
                _pending(await connection.command("XINFO", "GROUPS", raw)),
            )
        elif kind == "zset":
            dump[key] = await connection.command("ZRANGE", raw, 0, -1)
        elif kind == "set":
            dump[key] = sorted(await connection.command("SMEMBERS", raw))
        elif not key.endswith(":sweeper"):
            dump[key] = await connection.command("GET", raw)
    return dump


async def counts(connection: Connection) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """What the counters say of what waits and runs, and what the requests do."""
    keys, kept, found = PoolKeys(POOL), collections.Counter[str](), collections.Counter[str]()
    for name, value in text_pairs(await connection.command("HGETALL", keys.counters())).items():
        if name.startswith(("waiting:", "running:")):
            kept[name] = int(value)
    for key in await connection.command("KEYS", keys.request("*")):
        fields = await connection.command("HMGET", key, "state", "stage", "lane", "priority", "n")
        state, stage, lane, priority, n = (field.decode() for field in fields)
        found[f"waiting:{stage}:{lane}"] += state == "queued"
        found[f"running:{stage}:{priority}"] += (state == "running") * (int(n) if stage == "decode" else 1)
    return kept, found


def _pending(groups: list[Any]) -> list[Any]:
    flat = [
        list(group.items()) if isinstance(group, dict) else list(zip(group[0::2], group[1::2], strict=True))
        for group in groups
    ]
    return [[value for name, value in group if name == b"pending"] for group in flat]


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_repeated_call_gives_the_first_answer(
    script: str, redis_url: str, short_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    call = SCRIPTS[script]
    socket = redis_url.removeprefix("unix://")
    async with RedisProxy(socket, short_dir) as proxy:
        direct, lossy = Connection(RedisSettings(url=redis_url)), Connection(RedisSettings(url=proxy.url))
        try:
            row = {state: await check(call, state, direct, lossy, proxy) for state in PATHS}
        finally:
            await direct.close()
            await lossy.close()
    print(f"\n{script}: {row}")
    assert ANSWERS[script] == row


async def check(
    call: Callable[[Story], Awaitable[str]], state: str, direct: Connection, lossy: Connection, proxy: RedisProxy
) -> str:
    await direct.command("FLUSHALL")
    once = Story(direct)
    await reach(once, state)
    first = await call(once)
    after_once = await holds(direct)
    second = await call(once)
    assert second == first or call in (_swept, _evicted), f"{state}: the second call answers {second!r}, not {first!r}"
    assert await holds(direct) == after_once, f"{state}: the second call changed something"
    kept, found = await counts(direct)
    assert kept == found, f"{state}: the counters say {kept}, the requests {found}"

    await direct.command("FLUSHALL")
    again = Story(direct)
    await reach(again, state)
    again.queue = PoolQueue(lossy, POOL)
    lost = proxy.arm(Trap(None, "reply"))
    late = await call(again)
    assert late == first or call in (_swept, _evicted), (
        f"{state}: with its reply lost it answers {late!r}, not {first!r}"
    )
    assert lost.hit.is_set(), "no reply was lost"
    assert await holds(direct) == after_once, f"{state}: with its reply lost it left something else"
    return first


def read_answers() -> dict[str, dict[str, str]]:
    """The table of `pipeline/README.md`."""
    text = (Path(__file__).parents[2] / "pipeline" / "README.md").read_text()
    table = text.split("<!-- answers -->")[1].strip().splitlines()
    states = [cell.strip() for cell in table[0].strip("|").split("|")][1:]
    rows = {}
    for line in table[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = dict(zip(states, cells, strict=True))
    return rows


def write_answers(rows: dict[str, dict[str, str]]) -> str:
    """The same table as Markdown."""
    lines = ["| script | " + " | ".join(PATHS) + " |", "|---" * (len(PATHS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row.values()) + " |" for name, row in rows.items()]
    return "\n".join(lines)


ANSWERS = read_answers()
