"""The load, from a process of its own: chats and long prompts by Poisson processes, streamed as token ids.

A request is sent when it is due, whatever the others do, and its time to first token counts from then. Prompts are random token ids, so
none begins like another one. What is kept of an answer is when how many tokens came: all that one write of the server brought have the
same time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import msgspec
import uvloop

from benchmarks.gpu.http import Exchange

MODEL = "bench"
DRAIN_S = 60.0  # after the last request was sent
LEAD_S = 0.2  # before the first one


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request, and how many a second."""

    name: str
    prompt_tokens: int
    new_tokens: int
    per_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Due:
    """A request and when it is due, in seconds from the start."""

    kind: Kind
    at_s: float
    body: bytes


@dataclasses.dataclass(slots=True)
class Seen:
    """What a client saw of a request; times are those of `perf_counter`."""

    kind: str
    asked_tokens: int
    due_s: float
    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    prefilled_s: float = 0.0  # when the prefill engine of a pair had answered
    request_id: str = ""
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that came."""
        return sum(count for _, count in self.arrivals)

    @property
    def is_whole(self) -> bool:
        """Whether it got as many tokens as it asked for."""
        return not self.error and self.tokens == self.asked_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: to the servers in turn, or (`is_pair`) first to a prefill and then to a decode engine of vLLM."""

    ports: tuple[int, ...]
    is_pair: bool = False


class _Choice(msgspec.Struct):
    token_ids: list[int] = []


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None
    kv_transfer_params: Any = None


_event = msgspec.json.Decoder(_Event).decode
_encode = msgspec.json.encode
REMOTE_DECODE = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip


def plan(kinds: Sequence[Kind], seconds: float, vocab: int, seed: int) -> list[Due]:
    """All requests in the order in which they are due. `seed` says when; prompts are new ones each time, for no cache knows them."""
    found = []
    for kind in kinds:
        rng = random.Random(f"{seed} {kind.name}")
        at_s = rng.expovariate(kind.per_s) if kind.per_s else seconds
        while at_s < seconds:
            found.append(Due(kind, at_s, body_of(kind, vocab)))
            at_s += rng.expovariate(kind.per_s)
    return sorted(found, key=lambda due: due.at_s)


def at_once(kind: Kind, count: int, vocab: int) -> list[Due]:
    """So many of one kind at the same time."""
    return [Due(kind, 0.0, body_of(kind, vocab)) for _ in range(count)]


def body_of(kind: Kind, vocab: int) -> bytes:
    """A request with a prompt of its own; nothing ends it but its length."""
    prompt = random.choices(range(2, vocab), k=kind.prompt_tokens)
    return _encode(
        {
            "model": MODEL, "prompt": prompt, "max_tokens": kind.new_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }
    )  # fmt: skip


def run_apart(requests: Sequence[Due], target: Target) -> list[Seen]:
    """Send them from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (requests, target))


def _run(requests: Sequence[Due], target: Target) -> list[Seen]:
    return uvloop.run(run(requests, target))


async def run(requests: Sequence[Due], target: Target) -> list[Seen]:
    """Send each when it is due and read all answers to their end."""
    ports = itertools.cycle(target.ports)
    start_s = perf_counter() + LEAD_S
    seen, tasks = [], []
    for due in requests:
        await asyncio.sleep(max(0.0, start_s + due.at_s - perf_counter()))
        one = Seen(due.kind.name, due.kind.new_tokens, start_s + due.at_s)
        seen.append(one)
        tasks.append(asyncio.create_task(_send(one, due.body, target, next(ports))))
    if tasks:
        await asyncio.wait(tasks, timeout=DRAIN_S)
    for one, task in zip(seen, tasks, strict=True):
        if not task.done():
            one.error = f"not done {DRAIN_S:g} s after the last request was sent"
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _send(one: Seen, body: bytes, target: Target, port: int) -> None:
    one.sent_s = perf_counter()
    try:
        if target.is_pair:
            body, port = await _prefill(one, body, target.ports[0]), target.ports[1]
        exchange = Exchange(port)
        async for chunk in exchange.post(body):
            now_s, tokens = perf_counter(), 0
            for event in _events(chunk):
                tokens += sum(len(choice.token_ids) for choice in event.choices)
            if tokens:
                one.arrivals.append((now_s, tokens))
        one.request_id = exchange.request_id
    except Exception as error:  # noqa: BLE001  # it is told with the request
        one.error = f"{type(error).__name__}: {error}"


async def _prefill(one: Seen, body: bytes, port: int) -> bytes:
    """What vLLM's own proxies do: one token of the prefill engine, whose answer names the blocks; decode makes all tokens."""
    request = msgspec.json.decode(body)
    asked = {**request, "max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
    parts = [chunk async for chunk in Exchange(port).post(_encode(asked))]
    one.prefilled_s = perf_counter()
    handle = _event(b"".join(parts)).kv_transfer_params
    return _encode({**request, "kv_transfer_params": handle})


def _events(chunk: bytes) -> Iterator[_Event]:
    for block in chunk.split(b"\n\n"):
        _, found, data = block.partition(b"data: {")
        if not found:
            continue
        event = _event(b"{" + data)
        if event.error is not None:
            raise RuntimeError(str(event.error))
        yield event
