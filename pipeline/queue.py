"""The durable queue of one pool: each method is a script of `pipeline/scripts`, with typed arguments and answers.

Life of a request: admit -> claim (prefill) -> handover -> claim (decode) -> fetched -> step ... step -> end.
A method that answers with an outcome does not raise for it: fenced, ended and full are expected. `RedisUnavailable` is raised
when Redis does not answer in time; every call may then be repeated with the same arguments.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from pipeline.connection import Arg, Connection, Script
from pipeline.errors import IdempotencyConflict, KeyBusy, QueueFull, WireError
from pipeline.keys import PoolKeys
from pipeline.logprobs import pack_logprobs
from pipeline.protocol import (
    UNREADABLE,
    WIRE_VERSION,
    FinishReason,
    KVHandle,
    LLMEngineOutput,
    Log,
    Request,
    Timeline,
    TokenItem,
    pack_tokens,
    unpack_tokens,
)
from pipeline.routing import blocks_needed

STAGES = ("prefill", "decode")  # of a generation
EMBED = "embed"  # Baton's own stage beside them, and the name of its task; to all else it is a queue of tasks like any other
BATCH = "batch"  # a worker of all pools, which runs batches: no stage, and no lane is read by it
LANES = ("high", "default", "low")
HELD_BACK = "held_back"  # of a sweep: 1 while no lease is taken from anybody
SWEPT = ("expired", "parked", "dead", "moved", "deleted", "cancelled", "resumed", HELD_BACK)
PROMPT_PART_BYTES = 262_144  # of a prompt's log probabilities in one call: Redis serves nobody else meanwhile
ENDED_STATES = ("done", "failed", "cancelled", "expired", "dead")


class Verdict(enum.Enum):
    """What a script says to a worker about a request that it holds."""

    ACCEPTED = 0
    FENCED = 1  # another delivery owns it: stop, write nothing more
    ENDED = 2  # it ended elsewhere: stop and free
    GAP = 3  # the log is shorter than the item's index: the caller's picture of the log is wrong


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """One hand-out of a task to this worker. `body` is decoded by the consumer, so that bad bytes can be dead-lettered."""

    id: str
    epoch: int
    stage: str
    lane: str
    body: bytes
    handle: bytes
    attempts: int
    deadline_ms: int
    api: str
    prompt_tokens: int
    log: Log
    is_suspect: bool = (
        False  # its last delivery ended in a dead engine: nothing else is started beside it until it has made progress
    )
    priority: str = "default"  # the lane that its client asked for; `lane` is where it was claimed from

    @property
    def key(self) -> str:
        """The name of this delivery: a worker may get a request twice, and late outputs of the first are not the second's."""
        return delivery_key(self.id, self.epoch)


def delivery_key(request_id: str, epoch: int) -> str:
    """The name of one delivery of a request."""
    return f"{request_id}@{epoch}"


@dataclasses.dataclass(frozen=True, slots=True)
class StepItem:
    """One output as the step script takes it; `api` says which process streams it. The output's own id names the delivery."""

    request_id: str
    api: str
    epoch: int
    output: LLMEngineOutput


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands, for a reader. The usage is final when the state is an ended one; `request` is there for who asked for it.
    `linger_s`: how long it goes on without a reader; None: to its end."""

    state: str
    reason: str
    stage: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timeline: Timeline
    log: Log
    lane: str = ""
    attempts: int = 0
    linger_s: float | None = 0.0
    request: Request | None = None
    logprobs: list[bytes] = dataclasses.field(default_factory=list)  # by choice, where they were asked for

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED_STATES


@dataclasses.dataclass(frozen=True, slots=True)
class Brief:
    """How a request stands, in short: for who waits for its result. `is_retry`: it failed and waits for its next try."""

    state: str
    reason: str
    stage: str
    choices: int
    is_retry: bool
    result: bytes  # of its task, where that gave one

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED_STATES


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Admission limits and times of one request."""

    max_waiting_tasks: int
    max_waiting_tokens: int
    deadline_s: float
    result_ttl_s: float
    dead_ttl_s: float = 86_400.0
    max_held: int = 0  # requests of its owner that may wait and run in the pool; 0: no limit


KEY_BUSY_S = 1.0  # when a key whose slots are taken is told to come again: how long its requests take is not known

BLOCK_BEFORE = 16  # tokens of a block, as workers before 0.1.0 have it from the API; now each counts in its own


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A request on its way into a pool: where it starts, and what becomes of it when its API process ends."""

    request: Request
    stage: str
    lane: str
    api: str
    priority: str = "default"
    idempotency_key: str = ""
    linger_s: float | None = None  # it goes on for so long after its API process ended; None: to its end
    delay_s: float = 0.0  # nobody may claim it before
    replay_of: str = ""  # the dead-lettered request that it repeats
    digest: str = ""  # of the body, to tell two requests of one idempotency key apart
    notify: str = ""  # without an `api`: the process that hears of its end, and of nothing before


@dataclasses.dataclass(frozen=True, slots=True)
class LaneLook:
    """One look that a claim takes at a lane: tasks of at most `free_blocks`, and `which` of them.

    "aged": those that have waited long; "spare": those that no worker has started at once; "": all.
    """

    lane: str
    free_blocks: int
    which: Literal["", "spare", "aged"] = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What became of a request that its API brought back: "ok", an ended state, or "diverged"."""

    state: str
    choice: int = 0  # whose log says otherwise


class PoolQueue:
    """The scripts of one pool over one connection."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self.keys = PoolKeys(pool)
        self._connection = connection
        self._scripts: dict[str, Script] = {}
        self._encode = msgspec.msgpack.Encoder().encode

    async def _call(self, name: str, *args: Any, waits_for_memory: bool = True) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = Script(name)
        return await self._connection.call(script, self.keys.root, *args, waits_for_memory=waits_for_memory)

    # -- a client's side ----------------------------------------------------------------------------------------------

    async def admit(self, admission: Admission, limits: Limits) -> str:
        """Store the request and put its first task on a lane; returns its id, or the id of the first request of that key.

        Raises `QueueFull` when the lane is full; `retry_after_s` is then 0: the caller knows the drain rate. Raises
        `IdempotencyConflict` when the key's first request has another digest, `KeyBusy` when its owner holds `limits.max_held` requests.
        """
        lane, stage = admission.lane, admission.stage
        answer = await self._call(
            "admit", *self._stored(admission, limits), limits.max_waiting_tasks, limits.max_waiting_tokens,
            limits.max_held if admission.request.owner else 0, waits_for_memory=False,
        )  # fmt: skip
        if answer[0] == b"full":
            raise QueueFull(
                f"lane {lane} of {stage} holds {answer[1]} tasks and {answer[2]} prompt tokens: try again later",
                retry_after_s=0.0,
            )
        if answer[0] == b"busy":
            raise KeyBusy(
                f"the API key has {answer[1]} requests that wait or run, and may have {limits.max_held}: "
                "send this one when another has ended",
                retry_after_s=KEY_BUSY_S,
            )
        if answer[0] == b"conflict":
            raise IdempotencyConflict(
                f"the idempotency key already stands for request {answer[1].decode()}, which has another body: "
                "send this one under a key of its own",
                param="Idempotency-Key",
            )
        return answer[1].decode() if answer[0] == b"duplicate" else admission.request.id

    async def restore(self, admission: Admission, limits: Limits, log: Log) -> Restored:
        """Bring back what Redis lost of a request: all of it, or the end of its logs, which its client was sent."""
        rows = zip(log.tokens, log.finished, strict=True)
        logs = [value for tokens, reason in rows for value in (pack_tokens(tokens), reason or "")]
        answer = await self._call("restore", *self._stored(admission, limits), *logs)
        if answer[0] == b"ok":
            return Restored("ok")
        return Restored("diverged", int(answer[1])) if answer[0] == b"diverged" else Restored(answer[1].decode())

    def _stored(self, admission: Admission, limits: Limits) -> tuple[Arg, ...]:
        """The arguments of `request_of` in `_lib.lua`."""
        request, linger_s = admission.request, admission.linger_s
        prompt_tokens, n = len(request.input.token_ids), request.input.sampling_options.n
        return (
            request.id, admission.stage, admission.lane, self._encode(request), prompt_tokens,
            blocks_needed(prompt_tokens, n, BLOCK_BEFORE), n, WIRE_VERSION, admission.api, limits.deadline_s, int(limits.result_ttl_s),
            int(limits.dead_ttl_s), admission.priority, admission.idempotency_key,
            "" if linger_s is None else int(linger_s * 1000), int(admission.delay_s * 1000), admission.replay_of,
            admission.digest, admission.notify, request.owner,
        )  # fmt: skip

    async def first_of_keys(self, idempotency_keys: Sequence[str]) -> list[str | None]:
        """The requests that these stand for; None where there is none."""
        found = await self._connection.command("MGET", *map(self.keys.first_of_key, idempotency_keys))
        return [None if one is None else one.decode() for one in found]

    async def attach(self, request_id: str, *, watch: bool, with_request: bool = False) -> Standing | None:
        """State and logs of a request; with `watch` its tokens also go to its own channel. None when unknown.

        Raises `WireError` when the stored request was asked for and is not readable.
        """
        answer = await self._call("attach", request_id, "1" if watch else "", "1" if with_request else "")
        if not answer:
            return None
        state, reason, stage = (answer[i].decode() for i in range(3))
        prompt, completion, cached = (int(answer[i]) for i in range(3, 6))
        timeline = Timeline(*(int(value) for value in answer[6:13]))
        rows = [row for at, row in enumerate(answer[17:]) if at % 3 < 2]
        return Standing(
            state, reason, stage, prompt, completion, cached, timeline, _log(rows), lane=answer[13].decode(),
            attempts=int(answer[14]), linger_s=int(answer[15]) / 1000 if answer[15] else None, request=_stored(request_id, answer[16]),
            logprobs=answer[19::3],
        )  # fmt: skip

    async def prompt_logprobs(self, request_id: str) -> bytes:
        """The records of a request's prompt: all of them once it has a token or has ended without one, but for what Redis lost."""
        return await self._connection.command("GET", self.keys.prompt_logprobs(request_id)) or b""

    async def linger(self, request_id: str, seconds: float) -> str:
        """Nobody reads the request: it is cancelled unless a reader comes back in time. Returns "lingers" or "ended <state>"."""
        return " ".join(part.decode() for part in await self._call("linger", request_id, f"{seconds:g}"))

    async def still_read(self, request_ids: Sequence[str]) -> None:
        """These have a reader here: whatever another one said when it left, they are not cancelled for want of one."""
        await self._connection.command("ZREM", self.keys.orphans(), *request_ids)

    async def standing(self, request_ids: Sequence[str], *, with_results: bool = False) -> list[Brief | None]:
        """How each of these requests stands; None for those that are unknown."""
        rows = await self._call("standing", "1" if with_results else "", *request_ids)
        return [_brief(row) if row else None for row in rows]

    async def end(
        self, request_id: str, state: str, reason: str = "", *, worker: str = "", epoch: int | None = None, result: bytes = b""
    ) -> tuple[str, str]:  # fmt: skip
        """End a request; the first call wins. Returns (state, reason) as it stands, or ("fenced" | "gone" | "incomplete", "")."""
        answer = await self._call("end", request_id, state, reason, worker, "" if epoch is None else epoch, result)
        return answer[0].decode(), answer[1].decode()

    async def cancel(self, request_id: str, reason: str) -> tuple[str, str]:
        """End a request as cancelled, whoever holds it; its worker is told at once."""
        return await self.end(request_id, "cancelled", reason)

    async def purge(
        self, stage: str, lane: str, *, cursor: str, last: str, nonce: str, limit: int = 200
    ) -> tuple[int, str]:
        """End what waits on a part of a lane, up to the entry id `last`; returns how many, and where to go on ('' at the end)."""
        answer = await self._call("purge", stage, lane, cursor, last, limit, nonce)
        return int(answer[0]), answer[1].decode()

    async def drop(self, request_id: str, entry: str) -> str:
        """Forget a dead-lettered request; returns the state of one that is not dead and was left alone, else ''."""
        answer = await self._call("drop", request_id, entry)
        return answer[1].decode() if answer[0] == b"kept" else ""

    async def erase(self, request_id: str) -> tuple[str, str]:
        """Forget what an ended request was asked and said. Returns ("erased" | "kept", state), or ("gone", "")."""
        answer = await self._call("erase", request_id)
        return answer[0].decode(), answer[1].decode()

    # -- a worker's side ----------------------------------------------------------------------------------------------

    async def claim(
        self, stage: str, worker: str, looks: Sequence[LaneLook], *, total_blocks: int, block_size: int, overtake_ms: int,
        guard_ms: int = 0, held: int = 0, nonce: str = "",
    ) -> Delivery | None:  # fmt: skip
        """One task that fits, or None. `looks` in their order, the worker's own lane first; blocks are of `block_size` tokens;
        `held`: tasks that run here already."""
        flat = [value for look in looks for value in (look.lane, look.free_blocks, look.which)]
        answer = await self._call(
            "claim", stage, worker, nonce or secrets.token_hex(8), held, total_blocks, block_size, WIRE_VERSION, overtake_ms,
            guard_ms, *flat,
        )  # fmt: skip
        if not answer:
            return None
        return Delivery(
            id=answer[0].decode(), epoch=int(answer[1]), body=answer[2], stage=answer[3].decode(), lane=answer[4].decode(),
            handle=answer[5], attempts=int(answer[6]), deadline_ms=int(answer[7]), api=answer[8].decode(),
            prompt_tokens=int(answer[9]), is_suspect=answer[10] == b"1", log=_log(answer[12:]),
            priority=answer[11].decode() or "default",
        )  # fmt: skip

    async def handover(
        self, delivery: Delivery, worker: str, outputs: Sequence[LLMEngineOutput], kv: KVHandle | None, *,
        cached_tokens: int, lane: str = "",
    ) -> tuple[Verdict, str]:  # fmt: skip
        """End prefill's task and add decode's on `lane` (empty: the request's priority).

        Returns the verdict and where the request is now: "decode", "done", or the state in which it had ended.
        """
        for output in outputs:  # where that is refused, so is the hand-over
            await self.keep_prompt(worker, delivery.id, delivery.epoch, output.prompt_logprobs)
        items: list[Any] = []
        for output in outputs:
            tokens = pack_tokens(output.token_ids)
            reason = output.finish_reason or ""
            logprobs = pack_logprobs(output)
            frame_item = self.frame_item(delivery.id, output, tokens, logprobs)
            items += (output.choice, output.index, tokens, reason, frame_item, logprobs)
        handle = (self._encode(kv), kv.id, kv.owner) if kv else (b"", "", "")
        answer = await self._call("handover", delivery.id, delivery.epoch, worker, lane, *handle, cached_tokens, *items)
        return _verdict(answer), answer[1].decode() if len(answer) > 1 else ""

    async def fetched(
        self, delivery: Delivery, worker: str, *, recomputed: str = "", cached_tokens: int | None = None
    ) -> Verdict:
        """The request runs here and its handle is not needed any more: fetched, or lost for the reason `recomputed`."""
        cached = "" if cached_tokens is None else cached_tokens
        return _verdict(await self._call("fetched", delivery.id, delivery.epoch, worker, recomputed, cached))

    async def step(self, worker: str, items: Sequence[StepItem]) -> list[Verdict]:
        """Log and publish the outputs of a step of `worker`, one script call for each API process among them."""
        for item in items:
            if item.output.prompt_logprobs:  # where that is refused, so is the item
                await self.keep_prompt(worker, item.request_id, item.epoch, item.output.prompt_logprobs)
        verdicts: list[Verdict] = [Verdict.ENDED] * len(items)
        for api, positions in _by_api(items).items():
            args: list[Any] = []
            for position in positions:
                item = items[position]
                output = item.output
                tokens = pack_tokens(output.token_ids)
                reason = output.finish_reason or ""
                args += (item.request_id, item.epoch, output.choice, output.index, tokens, reason)
                logprobs = pack_logprobs(output)
                args += (self.frame_item(item.request_id, output, tokens, logprobs), logprobs)
            answers = await self._call("step", api, worker, *args)
            for position, answer in zip(positions, answers, strict=True):
                verdicts[position] = Verdict(answer)
        return verdicts

    async def keep_prompt(self, worker: str, request_id: str, epoch: int, records: bytes) -> Verdict:
        """Keep the log probabilities of a request's prompt, so that whoever sees its first token finds them."""
        there = 0
        while there < len(records):
            part = records[there : there + PROMPT_PART_BYTES]
            answer = await self._call("prompt", request_id, epoch, worker, there, part)
            if (verdict := _verdict(answer)) is not Verdict.ACCEPTED:
                return verdict
            there = int(answer[1])
        return Verdict.ACCEPTED

    def frame_item(self, request_id: str, output: LLMEngineOutput, tokens: bytes, logprobs: bytes) -> bytes:
        """An output as an item of a frame."""
        reason = output.finish_reason or ""
        return self._encode(TokenItem(request_id, output.choice, output.index, tokens, reason, logprobs))

    async def hand_back(
        self, delivery: Delivery, worker: str, *, counts: bool, max_attempts: int, why: str, delay_s: float = 0.0,
        is_suspect: bool = False,
    ) -> str:  # fmt: skip
        """Give a task back unfinished, to be claimed again after `delay_s`. Returns parked, dead, fenced or ended."""
        answer = await self._call(
            "handback", delivery.id, delivery.epoch, worker, "1" if counts else "", max_attempts, why, int(delay_s * 1000),
            "always" if is_suspect else "never",
        )  # fmt: skip
        return str(answer[0].decode())

    async def renew(
        self, role: str, name: str, info: bytes, lease_s: float, held: Sequence[tuple[str, int]] = ()
    ) -> list[bool]:
        """Say that this process lives and renew its leases; False for each (id, epoch) that is not its own any more."""
        flat = [value for pair in held for value in pair]
        return [answer == 1 for answer in await self._call("renew", role, name, info, int(lease_s * 1000), *flat)]

    async def leave(self, role: str, name: str) -> None:
        """Forget this process: it has left in good order."""
        await self._call("leave", role, name)

    async def evict(self, role: str, name: str, *, max_attempts: int) -> int:
        """Whoever saw a worker die says so: its tasks wait again at once. Returns how many they were."""
        return int(await self._call("evict", role, name, max_attempts))

    async def wanted(self, handles: Mapping[str, str]) -> set[str]:
        """Which handle ids (of handle id -> request id) are still named by their request."""
        flat = [value for handle_id, request_id in handles.items() for value in (request_id, handle_id)]
        answers = await self._call("wanted", *flat) if flat else []
        return {handle_id for handle_id, answer in zip(handles, answers, strict=True) if answer == 1}

    async def sweep(self, sweeper: str, *, interval_s: float, lease_s: float, max_attempts: int) -> dict[str, int]:
        """Put right what nobody else will; empty when another process swept within the interval."""
        answer = await self._call("sweep", sweeper, int(interval_s * 1000), int(lease_s * 1000), max_attempts)
        return dict(zip(SWEPT, answer, strict=False))


def _verdict(answer: Sequence[bytes]) -> Verdict:
    return {b"ok": Verdict.ACCEPTED, b"fenced": Verdict.FENCED, b"ended": Verdict.ENDED}[answer[0]]


def _stored(request_id: str, body: bytes) -> Request | None:
    if not body:
        return None
    try:
        return msgspec.msgpack.decode(body, type=Request)
    except UNREADABLE as error:
        raise WireError(f"request {request_id} is stored in a form that this version does not read: {error}") from error


def _brief(row: Sequence[bytes]) -> Brief:
    state, reason, stage = (part.decode() for part in row[:3])
    return Brief(state, reason, stage, int(row[3]), row[4] == b"1", row[5])


def _log(rows: Sequence[bytes]) -> Log:
    tokens = [unpack_tokens(row) for row in rows[0::2]]
    finished = [FinishReason(row.decode()) if row else None for row in rows[1::2]]
    return Log(tokens=tokens, finished=finished)


def _by_api(items: Iterable[StepItem]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.api, []).append(position)
    return groups
