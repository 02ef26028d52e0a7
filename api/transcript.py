"""Tokens of a request in, bytes of its events out. With ids, the same events can go on at any place of the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from api.event_ids import CERTAIN, COMPLETE, FINISHED, UNOPENED, Mark, Place
from api.feed import Choices
from api.logprobs import Logprobs
from api.sse import Events, TokenEvents, tells_tokens
from pipeline.protocol import Log, Request
from pipeline.stream import TokenChunk, Usage
from pipeline.tokenizer import NoTokenizer, Tokenizer


class Transcript:
    """The events of one answer. `opening`: what comes before the first token."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request) -> None:
        self.choices = Choices(tokenizer, request, by_token=True)
        self._events = events_of(request, Place.at_start(request))
        self._logprobs = Logprobs(tokenizer, request)
        self._include_usage = request.include_usage
        self.opening = self._events.opening

    def encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        """The events that these tokens make certain."""
        if self._logprobs.are_asked:
            return b"".join([self._encode((one,)) for one in one_by_one(chunks)])
        return self._encode(chunks)

    def _encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        events, logprobs = self._events, self._logprobs
        for chunk in chunks if logprobs.are_asked else ():
            logprobs.push(chunk)
        parts: list[bytes] = []
        for choice, text, token_ids, reason in self.choices.push(chunks):
            if text or token_ids:
                parts.append(events.piece(choice, text, token_ids, logprobs.take(choice)))
            if reason is not None:
                parts.append(events.finish(choice, reason, logprobs.take(choice)))
        return b"".join(parts)

    def usage(self, usage: Usage) -> bytes:
        """The usage event, for those who asked for it."""
        return self._events.usage(usage) if self._include_usage else b""


class NumberedTranscript(Transcript):
    """The same events with their ids, from `place` on. `log` holds at least the tokens that were sent by then; their text is made again and
    not given out, so that what was held back comes as it would have."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request, place: Place, log: Log) -> None:
        super().__init__(tokenizer, request)
        self._events = events_of(request, place)
        self._marks = [str(mark).encode() for mark in place.marks]
        self._include_usage = request.include_usage and not place.has_usage
        self.opening = b"".join(
            self._numbered(choice, Mark(0, CERTAIN), self._events.openings[choice])
            for choice, mark in enumerate(place.marks)
            if mark.phase == UNOPENED
        )
        for choice, mark in enumerate(place.marks):
            if mark.phase == CERTAIN:
                self.choices.skip(choice, log.tokens[choice][: mark.tokens])
                self._logprobs.skip(choice, log.tokens[choice][: mark.tokens])
            elif mark.phase == FINISHED:
                self.choices.reasons[choice] = log.finished[choice]

    @classmethod
    def from_start(cls, tokenizer: Tokenizer | NoTokenizer, request: Request) -> NumberedTranscript:
        """The whole answer."""
        return cls(tokenizer, request, Place.at_start(request), Log.empty(request.input.sampling_options.n))

    def encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        """The events that these tokens make certain; each knows by which token."""
        events = self._events
        parts: list[bytes] = []
        for one in one_by_one(chunks):
            count = one.index + len(one.token_ids)
            self._logprobs.push(one)
            for choice, text, token_ids, reason in self.choices.push((one,)):
                if text or token_ids:
                    is_last = reason is not None or one.finish_reason is not None
                    phase = COMPLETE if is_last else CERTAIN
                    event = events.piece(choice, text, token_ids, self._logprobs.take(choice))
                    parts.append(self._numbered(choice, Mark(count, phase), event))
                if reason is not None:
                    event = events.finish(choice, reason, self._logprobs.take(choice))
                    parts.append(self._numbered(choice, Mark(count, FINISHED), event))
        return b"".join(parts)

    def usage(self, usage: Usage) -> bytes:
        """The usage event, for those who asked for it and have not got it."""
        event = super().usage(usage)
        return b"id: " + b".".join(self._marks) + b"-u\n" + event if event else b""

    def _numbered(self, choice: int, mark: Mark, event: bytes) -> bytes:
        self._marks[choice] = str(mark).encode()
        return b"id: " + b".".join(self._marks) + b"\n" + event


def events_of(request: Request, place: Place) -> Events:
    """How the pieces of an answer become events from `place` on."""
    if not tells_tokens(request):
        return Events(request)
    return TokenEvents(request, [mark.tokens > 0 or mark.phase == FINISHED for mark in place.marks])


def one_by_one(chunks: Sequence[TokenChunk]) -> Iterator[TokenChunk]:
    """The same tokens in chunks of one; a finish reason stays with the last token, or without any."""
    for chunk in chunks:
        if not chunk.token_ids:
            yield chunk
        last = len(chunk.token_ids) - 1
        for offset in range(len(chunk.token_ids)):
            yield chunk.part(offset, offset + 1, chunk.finish_reason if offset == last else None)
