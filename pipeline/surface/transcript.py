"""Tokens of a request in, bytes of its events out. With ids, the same events can go on at any place of the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.answer_form import form_of
from pipeline.errors import BatonError
from pipeline.protocol import Log, Request
from pipeline.stream import Ended, TokenChunk
from pipeline.surface.event_ids import CERTAIN, COMPLETE, FINISHED, UNOPENED, Mark, Place
from pipeline.surface.feed import Choices, Piece
from pipeline.surface.logprobs import Logprobs
from pipeline.surface.shape import StreamShape
from pipeline.surface.shapes.openai import DONE, OpenAIEvents, OpenAIShape
from pipeline.tokenizer import NoTokenizer, Tokenizer


class Transcript:
    """The events of one answer. `opening`: what comes before the first token."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request, shape: StreamShape) -> None:
        self.choices = Choices(tokenizer, request, by_token=True)
        self._events = shape.events(request)
        self._logprobs = Logprobs(tokenizer, request)
        self._needs_order = self._logprobs.are_asked or form_of(request).continuous_usage
        self.opening = self._events.opening
        self.ping = shape.ping

    def encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        """The events that these tokens make certain."""
        if self._needs_order:  # what is told beside a token is that of its own moment
            return b"".join([self._encode((one,)) for one in one_by_one(chunks)])
        return self._encode(chunks)

    def end(self, ended: Ended) -> bytes:
        """What comes behind the last choice of a complete answer."""
        return self._events.end(ended)

    def error(self, error: BatonError) -> bytes:
        """What comes instead."""
        return self._events.error(error)

    def _encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        logprobs = self._logprobs
        for chunk in chunks if logprobs.are_asked else ():
            self._push_logprobs(chunk)
        return b"".join([event for piece in self.choices.push(chunks) for event in self._events_of(piece)])

    def _push_logprobs(self, chunk: TokenChunk) -> None:
        self._logprobs.push(chunk)
        prompt = self._logprobs.prompt() if chunk.prompt_logprobs is not None else None
        if prompt is not None and isinstance(self._events, OpenAIEvents):  # requests of other kinds ask for none
            self._events.tell_prompt(prompt)

    def _events_of(self, piece: Piece) -> Iterator[bytes]:
        choice, count = piece.choice, self.choices.num_tokens
        if piece.text or piece.token_ids or piece.parts:
            yield self._events.piece(piece, self._logprobs.take(choice), count)
        if piece.reason is not None and (word := self.choices.finish_word(choice)):
            stop_string = self.choices.stop_string(choice)
            yield self._events.finish(choice, word, self._logprobs.take(choice), count, stop_string)


class NumberedTranscript(Transcript):
    """The same events with their ids, from `place` on. `log` holds at least the tokens that were sent by then; their text is made again and
    not given out, so that what was held back comes as it would have."""

    def __init__(
        self, tokenizer: Tokenizer | NoTokenizer, request: Request, shape: OpenAIShape, place: Place, log: Log
    ) -> None:
        super().__init__(tokenizer, request, shape)
        begun = [mark.tokens > 0 or mark.phase in (COMPLETE, FINISHED) for mark in place.marks]
        self._events = self._openai = shape.events(request, begun)
        self._marks = [str(mark).encode() for mark in place.marks]
        self._has_usage = place.has_usage or not request.include_usage
        self.opening = b"".join(
            self._numbered(choice, Mark(0, CERTAIN), self._openai.openings[choice])
            for choice, mark in enumerate(place.marks)
            if mark.phase == UNOPENED
        )
        for choice, mark in enumerate(place.marks):
            self._skip(choice, mark, log)

    @classmethod
    def from_start(cls, tokenizer: Tokenizer | NoTokenizer, request: Request, shape: OpenAIShape) -> NumberedTranscript:
        """The whole answer."""
        return cls(tokenizer, request, shape, Place.at_start(request), Log.empty(request.input.sampling_options.n))

    def encode(self, chunks: Sequence[TokenChunk]) -> bytes:
        """The events that these tokens make certain; each knows by which token."""
        parts: list[bytes] = []
        for one in one_by_one(chunks):
            count = one.index + len(one.token_ids)
            self._push_logprobs(one)
            for piece in self.choices.push((one,)):
                is_last = piece.reason is not None or one.finish_reason is not None
                phases = iter((COMPLETE if is_last else CERTAIN, FINISHED))
                if not (piece.text or piece.token_ids or piece.parts):
                    next(phases)
                parts += [
                    self._numbered(piece.choice, Mark(count, phase), event)
                    for event, phase in zip(self._events_of(piece), phases, strict=False)
                ]
        return b"".join(parts)

    def end(self, ended: Ended) -> bytes:
        """The usage event, for those who asked for it and have not got it, and the end."""
        usage = b"" if self._has_usage else b"id: " + b".".join(self._marks) + b"-u\n" + self._openai.usage(ended.usage)
        return usage + DONE

    def _skip(self, choice: int, mark: Mark, log: Log) -> None:
        if mark.tokens == 0 and mark.phase in (UNOPENED, CERTAIN):
            return
        told = log.tokens[choice][: mark.tokens]
        self.choices.skip(choice, told, is_all=mark.phase in (COMPLETE, FINISHED))
        self._logprobs.skip(choice, told)
        if mark.phase == FINISHED:
            self.choices.reasons[choice] = log.finished[choice]

    def _numbered(self, choice: int, mark: Mark, event: bytes) -> bytes:
        self._marks[choice] = str(mark).encode()
        return b"id: " + b".".join(self._marks) + b"\n" + event


def transcript_of(
    tokenizer: Tokenizer | NoTokenizer, request: Request, shape: StreamShape, *, has_ids: bool = False
) -> Transcript:
    """The whole answer, with ids if they are asked for and this kind's events have some."""
    if has_ids and isinstance(shape, OpenAIShape):
        return NumberedTranscript.from_start(tokenizer, request, shape)
    return Transcript(tokenizer, request, shape)


def one_by_one(chunks: Sequence[TokenChunk]) -> Iterator[TokenChunk]:
    """The same tokens in chunks of one; a finish reason stays with the last token, or without any."""
    for chunk in chunks:
        if not chunk.token_ids:
            yield chunk
        last = len(chunk.token_ids) - 1
        for offset in range(len(chunk.token_ids)):
            yield chunk.part(offset, offset + 1, chunk.finish_reason if offset == last else None)
