"""One reader of one request: live items from the bus, gaps filled from the log, each (choice, index) exactly once and in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType

import msgspec
import structlog

from pipeline.errors import RedisUnavailable
from pipeline.logprobs import prompt_record_bytes, record_bytes, records_between
from pipeline.protocol import EndItem, FinishReason, Log, Request, Timeline, TokenItem, unpack_tokens
from pipeline.queue import ENDED_STATES, Restored, Standing

log = structlog.get_logger("baton.stream")

READ_AGAIN_S = 0.2
STREAM_DIVERGED = "stream_diverged"
SHORTEST_LINGER_S = 2.0  # another process that still has a reader says so each half second
PART_TOKENS = 512  # of a long log, at a time: what others are to be sent comes in between


class TokenChunk(msgspec.Struct, frozen=True):
    """Tokens of one choice that stand at `index` and after it; `logprobs`: the records of these tokens, where they were asked for.
    `prompt_logprobs`: those of the prompt, in the first chunk that a reader gets of a request that asks for them."""

    choice: int
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: bytes = b""
    prompt_logprobs: bytes | None = None

    def part(self, start: int, end: int, finish_reason: FinishReason | None) -> TokenChunk:
        """Its tokens from `start` to `end`."""
        size = len(self.logprobs) // len(self.token_ids)
        records = self.logprobs[start * size : end * size]
        prompt = self.prompt_logprobs if start == 0 else None
        return TokenChunk(self.choice, self.index + start, self.token_ids[start:end], finish_reason, records, prompt)


class Usage(msgspec.Struct, frozen=True):
    """What a request took. `cached_tokens` of the prompt were not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def total(usages: Iterable[Usage]) -> Usage:
    """What several requests took."""
    known = list(usages)
    return Usage(
        sum(usage.prompt_tokens for usage in known),
        sum(usage.completion_tokens for usage in known),
        sum(usage.cached_tokens for usage in known),
    )


class Ended(msgspec.Struct, frozen=True):
    """How a request ended: state is done, failed, cancelled, expired or dead; `stage` is where it stood."""

    state: str
    reason: str
    usage: Usage
    stage: str
    timeline: Timeline


def ended_of(standing: Standing) -> Ended:
    """How a request ended that has."""
    usage = Usage(standing.prompt_tokens, standing.completion_tokens, standing.cached_tokens)
    return Ended(standing.state, standing.reason, usage, standing.stage, standing.timeline)


class RequestStream:
    """Iterate it for lists of `TokenChunk`: each list is everything that queued up since the last one.

    Leaving the context forgets the request locally; `leave` says before that what becomes of it. After the iteration `ended` says how it
    ended. While Redis is away the stream waits; `RedisUnavailable` is raised when it was away for `patience_s`.

    `request`: what is read, where the reader knows it. `is_creator`: this reader submitted it; all others only look on. `linger_s`: how
    long the request goes on without any reader; None: to its end.
    """

    def __init__(
        self,
        request_id: str,
        choices: int,
        *,
        buffer_items: int,
        patience_s: float,
        read: Callable[[str], Awaitable[Standing | None]],
        cancel: Callable[[str, str], Awaitable[object]],
        forget: Callable[[RequestStream], Awaitable[None]],
        linger: Callable[[str, float], Awaitable[object]],
        read_prompt: Callable[[str], Awaitable[bytes]] | None = None,
        request: Request | None = None,
        is_creator: bool = True,
        linger_s: float | None = 0.0,
    ) -> None:
        self.id = request_id
        self.request = request
        self.is_creator = is_creator
        self.linger_s = linger_s
        self.is_left = False
        self.has_diverged = False  # it ended for this reader alone: the request itself may go on
        self.ended: Ended | None = None
        self._next = [0] * choices  # index of the first token of each choice that the reader has not got
        self._delivered: list[list[int]] = [
            [] for _ in range(choices)
        ]  # what the reader got: a log that says otherwise ends it
        self._reasons: list[FinishReason | None] = [
            None
        ] * choices  # why those choices ended that the reader has seen end
        self._buffer: list[TokenChunk] = []
        self._buffer_items = buffer_items
        self._record_bytes = record_bytes(request.input) if request is not None else 0
        self._lacks_prompt = read_prompt is not None and request is not None and prompt_record_bytes(request.input) > 0
        self._is_long = False  # the buffer holds chunks of more than `PART_TOKENS`
        self._behind = False  # the log knows more than the buffer: read it before going on
        self._waiter: asyncio.Future[None] | None = None
        self._read, self._cancel, self._forget, self._linger = read, cancel, forget, linger
        self._read_prompt = read_prompt
        self._restore: Callable[[Log], Awaitable[Restored]] | None = None
        self._last_item_s = time.monotonic()
        self._heard_s = self._last_item_s  # when Redis last answered a read; while it is away the stream waits
        self._patience_s = patience_s

    def serve(self, restore: Callable[[Log], Awaitable[Restored]]) -> None:
        """This reader's process answers for the request: what Redis loses of it is brought back by `restore`."""
        self._restore = restore

    # -- the bus's side: never blocks, never raises ---------------------------------------------------------------------

    def feed(self, item: TokenItem) -> None:
        """Take a live item: keep it, drop what the reader has, or note that something is missing."""
        if self.has_diverged:
            return
        choice, index, logprobs = item.choice, item.index, item.logprobs
        data = item.tokens
        if len(data) == 4 and index == self._next[choice]:
            tokens = [int.from_bytes(data, "little")]
        else:
            have = self._next[choice] - index
            if have < 0:
                self.fall_behind()
                return
            overlapping = unpack_tokens(data)
            if overlapping[:have] != self._delivered[choice][index : index + len(overlapping)]:
                self._diverge(choice)
                return
            tokens = overlapping[have:]
            if not tokens and not (item.finish_reason and self._reasons[choice] is None):
                return
            index += have
            logprobs = logprobs[have * self._record_bytes :]
        if self._behind:
            return
        if len(self._buffer) >= self._buffer_items:  # a slow reader goes on from the log, this process does not grow
            self.fall_behind()
            return
        reason = FinishReason(item.finish_reason) if item.finish_reason else None
        self._append(choice, index, tokens, reason, logprobs if self._record_bytes else b"")
        self._wake()

    def feed_end(self, item: EndItem) -> None:
        """Take the end of the request; tokens that never came live are read from the log first."""
        if self.has_diverged:
            return
        usage = Usage(item.prompt_tokens, item.completion_tokens, item.cached_tokens)
        self.ended = Ended(item.state, item.reason, usage, item.stage, item.timeline)
        is_short = sum(self._next) < item.completion_tokens
        if is_short or (item.state == "done" and None in self._reasons):
            self._behind = True
        self._wake()

    def fall_behind(self) -> None:
        """Something was or may have been missed: the reader reads state and log before it goes on."""
        self._behind = True
        self._wake()

    def silent_for_s(self, now_s: float) -> float:
        """Seconds since anything came."""
        return now_s - self._last_item_s

    def _append(self, choice: int, index: int, tokens: list[int], reason: FinishReason | None, logprobs: bytes) -> None:
        self._next[choice] = index + len(tokens)
        self._delivered[choice] += tokens
        if reason is not None:
            self._reasons[choice] = reason
        self._buffer.append(TokenChunk(choice, index, tokens, reason, logprobs))

    def _diverge(self, choice: int, certain: Sequence[int] | None = None) -> None:
        """Redis lost the end of a log and other tokens stand there now: end the stream rather than splice two answers.

        `certain`: how many tokens of each choice were there before Redis was asked; what came live since may be of the other answer.
        """
        self.has_diverged = True
        if certain is not None:
            self._buffer = [chunk for chunk in self._buffer if chunk.index < certain[chunk.choice]]
        if self.ended is None or self.ended.state == "done":
            why = f"{STREAM_DIVERGED}: Redis lost tokens of choice {choice} that were already sent; send the request again"
            self.ended = Ended("failed", why, Usage(0, sum(self._next), 0), "decode", Timeline())
        self._behind = False
        self._wake()

    def give_up(self, why: str) -> None:
        """Nothing will come any more: the client that feeds this stream was closed."""
        if self.ended is None:
            self.ended = Ended("failed", why, Usage(0, sum(self._next), 0), "", Timeline())
        self._behind = False
        self._wake()

    def _wake(self) -> None:
        self._last_item_s = time.monotonic()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the reader's side ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._forget(self)

    def begin(self, standing: Standing, start: Sequence[int]) -> None:
        """Go on behind the first `start` tokens of each choice: the reader has them, and they are what the log says."""
        for choice, (tokens, count) in enumerate(zip(standing.log.tokens, start, strict=True)):
            self._next[choice] = count
            self._delivered[choice] = tokens[:count]
        self._lacks_prompt &= 0 in start
        self._take(standing, start)

    async def __aiter__(self) -> AsyncIterator[list[TokenChunk]]:
        while True:
            if self._behind:
                await self._catch_up()
            if self._buffer and self._lacks_prompt:
                await self._begin_with_prompt()
            elif self._buffer:
                chunks, self._buffer = self._buffer, []
                if not self._is_long:
                    yield chunks
                    continue
                self._is_long = False
                for part in in_parts(chunks):
                    yield [part]
                    await asyncio.sleep(0)
            elif self._behind:
                continue  # Redis did not answer: what was missed is still to be read, also when the end came meanwhile
            elif self.ended is not None:
                return
            else:
                await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter  # limited by the client's silence check, which calls `fall_behind`
        finally:
            self._waiter = None

    async def _catch_up(self) -> None:
        self._behind = False
        sent = list(self._next)  # what comes live while the log is read is no loss
        try:
            standing = await self._read(self.id)
        except RedisUnavailable as error:
            self._behind = True
            await self._be_patient(error)
            return
        self._heard_s = time.monotonic()
        if standing is None and self._restore is None:
            gone = Usage(0, sum(self._next), 0)
            self.ended = Ended("failed", "Redis does not know this request any more", gone, "", Timeline())
            return
        if standing is None or self._is_behind(standing, sent):
            await self._bring_back(sent)
            return
        self._take(standing, sent)

    async def _begin_with_prompt(self) -> None:
        """Something is there to be told, so all that is known of the prompt is there, too."""
        assert self._read_prompt is not None
        try:
            records = await self._read_prompt(self.id)
        except RedisUnavailable as error:
            await self._be_patient(error)
            return
        self._heard_s = time.monotonic()
        if self._buffer:
            self._buffer[0] = msgspec.structs.replace(self._buffer[0], prompt_logprobs=records)
            self._lacks_prompt = False

    async def _be_patient(self, error: RedisUnavailable) -> None:
        """Wait a moment, and raise when Redis was away for too long."""
        if time.monotonic() - self._heard_s > self._patience_s:
            raise error
        log.warning("Redis is away, the stream waits", request_id=self.id, error=str(error))
        await asyncio.sleep(READ_AGAIN_S)

    def _take(self, standing: Standing, certain: Sequence[int]) -> None:
        """Take what the log knows and the reader does not."""
        for choice, (tokens, reason) in enumerate(zip(standing.log.tokens, standing.log.finished, strict=True)):
            sent = self._delivered[choice]
            if tokens[: len(sent)] != sent[: len(tokens)]:
                self._diverge(choice, certain)
                return
            missing = tokens[self._next[choice] :]
            if missing or (reason is not None and self._reasons[choice] is None):
                self._append(choice, self._next[choice], missing, reason, self._records(standing, choice, len(tokens)))
                self._is_long |= len(missing) > PART_TOKENS
        if standing.has_ended and self.ended is None:
            self.ended = ended_of(standing)

    def _records(self, standing: Standing, choice: int, count: int) -> bytes:
        """The records of the tokens that the reader has not got, of `count` in all."""
        if not self._record_bytes:
            return b""
        return records_between(standing.logprobs[choice], self._next[choice], count, self._record_bytes)

    def _is_behind(self, standing: Standing, sent: list[int]) -> bool:
        """Whether a living request's logs hold less than the reader was sent: Redis lost the difference."""
        lengths = (len(tokens) for tokens in standing.log.tokens)
        is_short = any(length < count for length, count in zip(lengths, sent, strict=True))
        return is_short and self._restore is not None and standing.state not in ENDED_STATES

    async def _bring_back(self, sent: list[int]) -> None:
        assert self._restore is not None
        try:
            restored = await self._restore(Log(tokens=self._delivered, finished=self._reasons))
        except RedisUnavailable as error:
            log.warning("not brought back yet, trying again", request_id=self.id, error=str(error))
            self._behind = True
            await asyncio.sleep(READ_AGAIN_S)
            return
        if restored.state == "diverged":
            self._diverge(restored.choice, sent)
        elif restored.state != "ok":
            self._behind = True  # it ended meanwhile: read how

    async def cancel(self, reason: str = "client disconnected") -> None:
        """End the request; whoever holds it stops and frees its blocks."""
        await self._cancel(self.id, reason)

    async def leave(self, reason: str) -> None:
        """The reader goes before the end. A request that needs no reader goes on, one that may linger waits for another one, any other
        is cancelled if this reader created it."""
        self.is_left = True
        if (self.ended is not None and not self.has_diverged) or self.linger_s is None:
            return
        if self.linger_s > 0:
            await self._linger(self.id, max(self.linger_s, SHORTEST_LINGER_S))
        elif self.is_creator:
            await self.cancel(reason)


def in_parts(chunks: Sequence[TokenChunk]) -> Iterator[TokenChunk]:
    """The same tokens in chunks that are not long; a finish reason stays with the last token."""
    for chunk in chunks:
        tokens, start = chunk.token_ids, 0
        while len(tokens) - start > PART_TOKENS:
            yield chunk.part(start, start + PART_TOKENS, None)
            start += PART_TOKENS
        yield chunk.part(start, len(tokens), chunk.finish_reason) if start else chunk
