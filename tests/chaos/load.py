"""Clients: a closed loop of them, each seeded, over HTTP and over the Python client. Each checks what it sees as it comes.

A client asks, reads (all of it, or slowly, or not to the end), notes the outcome, and asks again, until the load is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx

from pipeline.client import PoolClient
from pipeline.errors import QueueFull, RedisUnavailable
from pipeline.stream import RequestStream
from tests.chaos.fleet import SHOWS_KEY, Fleet
from tests.chaos.journal import DIED, DONE, FAILED, HUNG, LEFT, REFUSED, Journal, Record
from tests.chaos.shapes import Shape, request_id_of

# A client that waits longer than this for the end of its answer has hung. A request may meet several faults in a row, and vLLM takes 10 s
# and more to start.
HUNG_S = {"mock": 90.0, "torch": 90.0, "vllm": 240.0}
LEAVES = 0.15  # of all requests
SHARES = {
    "whole": 0.25,
    "slow": 0.4,
    "resumed": 0.7,
}  # of those over HTTP, one above the other; the rest are plain streams
DEATH_NOTICED_S = 2.0  # a connection that ends this long after its API was harmed ended because of that
GOODBYE = "the client of the chaos suite leaves"


@dataclasses.dataclass
class Reading:
    """How far a client has come in a stream."""

    texts: list[str]
    last_id: str = ""


class Load:
    """`run` it as a task; after `stop` every client finishes what it is at."""

    def __init__(self, fleet: Fleet, journal: Journal, shapes: list[Shape], client: PoolClient, seed: int) -> None:
        self._fleet, self._journal, self._client, self._seed = fleet, journal, client, seed
        self._hung_s = HUNG_S[fleet.engine]
        self._direct = [shape for shape in shapes if shape.is_direct]
        self._http = [shape for shape in shapes if not shape.is_direct]
        self._is_over = False

    async def run(self, clients: int) -> None:
        """Returns when every client has seen the end of its last request."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client_loop(number))

    def stop(self) -> None:
        """Ask nothing new."""
        self._is_over = True

    async def _client_loop(self, number: int) -> None:
        rng = random.Random(f"{self._seed} client {number}")
        async with httpx.AsyncClient(timeout=self._hung_s, trust_env=False, headers=SHOWS_KEY) as http:
            while not self._is_over:
                if number % 2:
                    await self._ask_directly(rng)
                else:
                    await self._ask_over_http(rng, http)
                await asyncio.sleep(rng.uniform(0, 0.1))

    # -- the Python client ------------------------------------------------------------------------------------------------

    async def _ask_directly(self, rng: random.Random) -> None:
        record = self._journal.begin(rng.choice(self._direct), "direct")
        leaves_after = rng.randrange(1, 20) if rng.random() < LEAVES else 0
        try:
            async with asyncio.timeout(self._hung_s):
                outcome, reason = await self._read_directly(record, leaves_after)
        except TimeoutError:
            outcome, reason = HUNG, f"no end within {self._hung_s:g} s"
        except (QueueFull, RedisUnavailable) as error:
            outcome, reason = (FAILED if record.id else REFUSED), str(error)
        self._journal.end(record, outcome, reason)

    async def _read_directly(self, record: Record, leaves_after: int) -> tuple[str, str]:
        stream = await self._client.submit(record.shape.request())
        self._journal.name(record, stream.id)
        seen: list[list[int]] = [[] for _ in range(record.shape.n)]
        async with stream:
            async for chunks in stream:
                for chunk in chunks:
                    record.repeated += len(seen[chunk.choice]) > chunk.index
                    if len(seen[chunk.choice]) < chunk.index:
                        record.wrong = f"a gap before token {chunk.index} of choice {chunk.choice}"
                    seen[chunk.choice] += chunk.token_ids
                self._journal.progress(record)
                if leaves_after and sum(map(len, seen)) >= leaves_after:
                    await self._cancel(stream)
                    leaves_after = 0
        ended = stream.ended
        assert ended is not None
        compare(record, seen, record.shape.tokens, is_whole=ended.state == "done")
        if ended.state == "done":
            return DONE, ""
        return (LEFT if ended.reason == GOODBYE else FAILED), f"{ended.state}: {ended.reason}"

    async def _cancel(self, stream: RequestStream) -> None:
        with contextlib.suppress(RedisUnavailable):  # then it runs to its end
            await stream.cancel(GOODBYE)

    # -- HTTP -------------------------------------------------------------------------------------------------------------

    async def _ask_over_http(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        draw = rng.random()
        how = next((how for how, share in SHARES.items() if draw < share), "stream")
        leaves_after = rng.randrange(1, 20) if rng.random() < LEAVES else 0
        apis = self._fleet.of("api")
        api = rng.choice([member for member in apis if member.is_whole] or apis)  # as a load balancer does
        record = self._journal.begin(rng.choice(self._http), how, api)
        try:
            async with asyncio.timeout(self._hung_s):
                read = {"whole": self._read_whole, "resumed": self._read_resumed}.get(how, self._read_stream)
                outcome, reason = await read(record, http, leaves_after)
        except TimeoutError:
            outcome, reason = HUNG, f"no end within {self._hung_s:g} s"
        except httpx.TransportError as error:
            was_harmed = api.harmed_s > record.began_s - DEATH_NOTICED_S or not api.is_whole
            reason = f"{type(error).__name__}: {error}"
            early = REFUSED if isinstance(error, httpx.ConnectError) else DIED  # nobody heard what was asked
            outcome = early if was_harmed else FAILED
        self._journal.end(record, outcome, reason)
        if outcome in (DIED, REFUSED):
            await asyncio.sleep(0.2)  # as a client that knows how to retry

    async def _read_whole(self, record: Record, http: httpx.AsyncClient, leaves_after: int) -> tuple[str, str]:
        assert record.api is not None
        url = record.api.url + record.shape.path
        patience_s = leaves_after * 0.03 if leaves_after else self._hung_s
        try:
            async with asyncio.timeout(patience_s):
                answer = await http.post(url, json=record.shape.body(stream=False))
        except TimeoutError:
            if not leaves_after:
                raise
            return LEFT, ""
        body = answer.json()
        if "error" in body:
            return refusal(answer.status_code, body["error"])
        self._journal.name(record, request_id_of(body["id"]))
        texts = [choice["message"]["content"] if record.shape.chat else choice["text"] for choice in body["choices"]]
        compare(record, texts, record.shape.texts, is_whole=True)
        return DONE, ""

    async def _read_stream(self, record: Record, http: httpx.AsyncClient, leaves_after: int) -> tuple[str, str]:
        assert record.api is not None
        asked = http.stream("POST", record.api.url + record.shape.path, json=record.shape.body(stream=True))
        return await self._read_events(record, asked, leaves_after, Reading([""] * record.shape.n))

    async def _read_resumed(self, record: Record, http: httpx.AsyncClient, leaves_after: int) -> tuple[str, str]:
        """A client that goes on at any API where its connection ended; one that leaves says so."""
        assert record.api is not None
        body, headers = record.shape.body(stream=True), {"X-Baton-Resumable": "true"}
        reading = Reading([""] * record.shape.n)
        asked = http.stream("POST", record.api.url + record.shape.path, json=body, headers=headers)
        while True:
            try:
                outcome, reason = await self._read_events(record, asked, leaves_after, reading)
            except httpx.TransportError:
                if not record.id:
                    raise  # nobody told what it is called
            else:
                if outcome == LEFT:
                    await self._say_goodbye(record, http)
                lags = (
                    "ahead of the log" in reason and self._fleet.redis.power_cuts_s
                )  # what was lost is computed again
                goes_on = record.id and (outcome == REFUSED or lags)
                if not goes_on:
                    return outcome, reason
            await asyncio.sleep(0.2)
            api = next((member for member in self._fleet.of("api") if member.is_whole), record.api)
            headers = {"Last-Event-ID": reading.last_id} if reading.last_id else {}
            asked = http.stream("GET", f"{api.url}/v1/streams/{record.id}", headers=headers)

    async def _say_goodbye(self, record: Record, http: httpx.AsyncClient) -> None:
        while True:
            for member in self._fleet.of("api"):
                with contextlib.suppress(httpx.TransportError):
                    answer = await http.post(f"{member.url}/v1/requests/{record.id}/cancel")
                    if answer.status_code == httpx.codes.OK:
                        return
            await asyncio.sleep(0.2)

    async def _read_events(
        self,
        record: Record,
        asked: contextlib.AbstractAsyncContextManager[httpx.Response],
        leaves_after: int,
        reading: Reading,
    ) -> tuple[str, str]:
        shape, texts = record.shape, reading.texts
        events = 0
        async with asked as answer:
            if answer.status_code != httpx.codes.OK:
                return refusal(answer.status_code, json.loads(await answer.aread())["error"])
            async for event_id, event in events_of(answer):
                reading.last_id = event_id or reading.last_id
                if event is None:
                    compare(record, texts, shape.texts, is_whole=True)
                    return DONE, ""
                if "error" in event:
                    compare(record, texts, shape.texts, is_whole=False)
                    return refusal(0, event["error"])
                if not record.id:
                    self._journal.name(record, request_id_of(event["id"]))
                self._take(record, event, texts)
                events += 1
                if events == leaves_after:
                    compare(record, texts, shape.texts, is_whole=False)
                    return LEFT, ""
                if record.how == "slow" and events % 8 == 0:
                    await asyncio.sleep(0.4)
        return FAILED, "the stream ended without [DONE]"

    def _take(self, record: Record, event: dict[str, Any], texts: list[str]) -> None:
        for choice in event["choices"]:
            text = choice["delta"].get("content", "") if record.shape.chat else choice["text"]
            texts[choice["index"]] += text
            if text:
                self._journal.progress(record)


def refusal(status: int, error: dict[str, Any]) -> tuple[str, str]:
    """The outcome behind an error's body: 503 came before the request was accepted."""
    is_early = status == httpx.codes.SERVICE_UNAVAILABLE
    return (REFUSED if is_early else FAILED), f"{status or 'event'} {error['code']}: {error['message']}"


async def events_of(answer: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any] | None]]:
    """The events of a stream as they come, with their ids where they have some; None is `[DONE]`."""
    event_id = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield event_id, None if data == "[DONE]" else json.loads(data)


def compare(record: Record, seen: list[Any], expected: list[Any], *, is_whole: bool) -> None:
    """What its client saw, against the undisturbed answer: all of it, or the beginning of each choice."""
    if is_whole and seen == expected:
        return
    if not is_whole and all(all_[: len(part)] == part for part, all_ in zip(seen, expected, strict=True)):
        return
    record.seen = seen
    record.wrong = record.wrong or f"other than undisturbed: {first_difference(seen, expected)}"


def first_difference(seen: list[Any], expected: list[Any]) -> str:
    """Where two answers part, in words."""
    for choice, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
        if ours != theirs:
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            at = min(len(ours), len(theirs)) if same is None else same
            return f"choice {choice} at {at}: {ours[at : at + 8]!r} of {len(ours)}, not {theirs[at : at + 8]!r} of {len(theirs)}"
    return "nothing"
