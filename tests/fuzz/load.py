"""The clients: each sends its asks one after the other, and what is wrong with an answer is written down."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import urllib.parse
from collections.abc import Callable, Iterable

import httpx

from tests.fuzz.asks import ANSWER, HURRY, TEAR, Ask
from tests.fuzz.mutations import KNOWN_ID
from tests.openapi_page import SSE, Page

HUNG_S = 90.0  # longer than the deadline of any request
KEPT_IDS = 500
SHORT_S = 5.0  # a deadline of the client's own that may well pass
LONGEST_COMPLAINT = 1500
FRAMING = (b"content-length", b"transfer-encoding", b"host")


@dataclasses.dataclass
class Tally:
    """What came of it. `wrong`: sentences."""

    sent: int = 0
    sources: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    manners: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    paths: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    streams: int = 0
    left_streams: int = 0
    hung: int = 0
    unsendable: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


class Clients:
    """So many clients of a server. `on_sent` is told how many requests are over."""

    def __init__(self, url: str, page: Page, count: int, number: int, on_sent: Callable[[int], None]) -> None:
        self.tally = Tally()
        self._url = httpx.URL(url)
        self._page = page
        self._count = count
        self._random = random.Random(number)
        self._ids: collections.deque[str] = collections.deque(["none"], maxlen=KEPT_IDS)
        self._on_sent = on_sent

    async def send(self, asks: Iterable[Ask]) -> None:
        """All of them, so many at once."""
        waiting = iter(asks)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self._client(waiting))

    async def _client(self, asks: Iterable[Ask]) -> None:
        async with httpx.AsyncClient(timeout=HUNG_S) as http:
            for ask in asks:
                await self._one(http, ask)

    async def _one(self, http: httpx.AsyncClient, ask: Ask) -> None:
        ask.target = ask.target.replace(KNOWN_ID, urllib.parse.quote(self._random.choice(self._ids), safe=""))
        tally = self.tally
        try:
            async with asyncio.timeout(HUNG_S):
                await {ANSWER: self._answer, TEAR: self._tear}.get(ask.manner, self._leave)(http, ask)
        except TimeoutError:
            tally.hung += 1
            self._complain(ask, f"no end within {HUNG_S:g} s")
        except httpx.LocalProtocolError:
            tally.unsendable += 1
        except (httpx.TransportError, OSError) as error:
            self._complain(ask, f"the connection ended: {error!r}")
        tally.sent += 1
        tally.sources[ask.source] += 1
        tally.manners[ask.manner] += 1
        tally.paths[ask.path or "(others)"] += 1
        self._on_sent(tally.sent)

    def _url_of(self, ask: Ask) -> httpx.URL:
        return self._url.copy_with(raw_path=ask.target.encode("ascii", "ignore"))

    async def _answer(self, http: httpx.AsyncClient, ask: Ask) -> None:
        response = await http.request(ask.method, self._url_of(ask), headers=_own(ask.headers), content=ask.body)
        self._note(response)
        self._judge(ask, response)

    async def _leave(self, http: httpx.AsyncClient, ask: Ask) -> None:
        """Goes within the answer, or before it, with its connection: a pool that a client shares would keep what was cancelled."""
        before, within = (ask.leave_after, 0) if ask.manner == HURRY else (None, ask.leave_after)
        with contextlib.suppress(TimeoutError):
            async with httpx.AsyncClient(timeout=HUNG_S, verify=False) as own, asyncio.timeout(before) as limit:
                async with own.stream(
                    ask.method, self._url_of(ask), headers=_own(ask.headers), content=ask.body
                ) as response:
                    self._note(response)
                    self.tally.left_streams += is_stream(response)
                    limit.reschedule(asyncio.get_running_loop().time() + within)
                    async for _ in response.aiter_raw():
                        await asyncio.sleep(0.01)
                    self.tally.left_streams -= is_stream(response)  # it was over before

    async def _tear(self, http: httpx.AsyncClient, ask: Ask) -> None:
        """Promises more of a body than it sends, and goes."""
        _, writer = await asyncio.open_connection(self._url.host, self._url.port)
        try:
            head = f"{ask.method} {ask.target} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(ask.body) + 9}\r\n\r\n".encode()
            writer.write(head + ask.body)
            await writer.drain()
            await asyncio.sleep(ask.leave_after)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _note(self, response: httpx.Response) -> None:
        self.tally.statuses[response.status_code] += 1
        if (request_id := response.headers.get("x-baton-request-id")) is not None:
            self._ids.append(request_id)

    def _judge(self, ask: Ask, response: httpx.Response) -> None:
        self.tally.streams += is_stream(response)
        try:
            self._check(ask, response)
        except (AssertionError, BaseExceptionGroup, ValueError) as error:
            reasons = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
            self._complain(ask, f"{response.status_code}: " + "; ".join(str(reason) for reason in reasons))

    def _check(self, ask: Ask, response: httpx.Response) -> None:
        status = response.status_code
        assert status < 500 or is_asked_for(ask, response), f"a server error: {response.text[:300]}"
        if ask.path and status != 405:
            self._page.check(ask.path, ask.method.lower(), status, response.headers, response.content)
        if ask.check is not None:
            ask.check(response)

    def _complain(self, ask: Ask, what: str) -> None:
        self.tally.wrong.append(f"{what[:LONGEST_COMPLAINT]}\n    {ask}")


def is_stream(response: httpx.Response) -> bool:
    """Whether the answer is events."""
    return response.headers.get("content-type", "").startswith(SSE)


def _own(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without those that say how long the body is and where it goes."""
    return [(name, value) for name, value in headers if name.lower() not in FRAMING]


def is_asked_for(ask: Ask, response: httpx.Response) -> bool:
    """Whether a server error may be: the queue is full, or the client's own deadline was short."""
    if response.status_code in (503, 529):
        return b"overloaded" in response.content
    if response.status_code == 504 and (ask.target.startswith("/v1/streams/") or ask.header("idempotency-key")):
        return True  # another one's deadline, whose request this reads
    return response.status_code == 504 and any(
        0 < seconds < SHORT_S for seconds in map(_seconds, (ask.header("x-request-timeout"), ask.header("x-stainless-read-timeout")))
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
