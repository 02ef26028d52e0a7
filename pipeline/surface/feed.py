"""What an answer is made of: the items of a request's stream, interruptible, and what its choices say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import NamedTuple

from pipeline.answer_form import form_of
from pipeline.backend import Backend
from pipeline.errors import Draining
from pipeline.parsers.choose import parsers_of
from pipeline.parsing import Part, PartKind
from pipeline.protocol import FinishReason, Request
from pipeline.stream import RequestStream, TokenChunk
from pipeline.surface.said import FINISH_WORDS, finish_word, is_parsed
from pipeline.tokenizer import NoTokenizer, Tokenizer


class Piece(NamedTuple):
    """What a token, or some, make certain. `text` (it may be empty) is content unless the answer is parsed: then it is in `parts`.
    `token_ids`: where they are told. `reason`: why the choice is over."""

    choice: int
    text: str
    token_ids: Sequence[int]
    reason: FinishReason | None
    parts: list[Part] | None = None


class Feed:
    """Reads one `RequestStream`. An interrupt (the server leaves) ends the waiting at once, whether or not Redis answers."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self._items: AsyncIterator[list[TokenChunk]] = aiter(stream)
        self._reader: asyncio.Task[object] | None = None
        self._is_interrupted = False

    async def next(self) -> list[TokenChunk] | None:
        """Everything that queued up since the last call, None after the end. Raises Draining when interrupted."""
        if self._is_interrupted:
            raise _interrupted()
        reader = self._reader = asyncio.current_task()
        assert reader is not None
        try:
            return await anext(self._items, None)
        except asyncio.CancelledError:
            if self._is_interrupted and reader.uncancel() == 0:
                raise _interrupted() from None
            raise
        finally:
            self._reader = None

    async def first_tokens(self) -> list[TokenChunk] | None:
        """As `next`, but waits until there is a token or a choice has come to its end without one, so that what fails before can still be
        answered with a status."""
        waiting: list[TokenChunk] = []
        while (chunks := await self.next()) is not None:
            waiting += chunks
            if any(chunk.token_ids or chunk.finish_reason in FINISH_WORDS for chunk in chunks):
                return waiting
        return None

    def interrupt(self) -> None:
        """End the waiting, now and for good."""
        self._is_interrupted = True
        if self._reader is not None:
            self._reader.cancel()

    async def close(self) -> None:
        """Give up an iteration that did not reach its end."""
        if isinstance(self._items, AsyncGenerator):
            await self._items.aclose()


def _interrupted() -> Draining:
    return Draining("the server shut down before the answer was complete: send the request again", retry_after_s=1.0)


class Choices:
    """What all choices of a request say, and their tokens where it wants them told; `by_token`: each token is a piece of its own,
    however many came together."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request, *, by_token: bool) -> None:
        form, n = form_of(request), request.input.sampling_options.n
        self._backends = [Backend(tokenizer, request.input) for _ in range(n)]
        self._parsers = parsers_of(tokenizer, form, request.input.token_ids, n) if is_parsed(request) else None
        self._echo = echo_of(tokenizer, request) if form.echoes else ""
        self._has_echoed = [not self._echo] * n
        self._by_token = by_token
        self._tells_tokens = form.return_token_ids
        self._has_calls = [False] * n
        self._is_told = [False] * n  # all that was said, by somebody else
        self.reasons: list[FinishReason | None] = [None] * n
        self.num_tokens = 0  # of all choices, so far

    @property
    def are_complete(self) -> bool:
        """Whether every choice has come to its end."""
        return None not in self.reasons

    def finish_word(self, choice: int) -> str | None:
        """OpenAI's word for the end of a choice; None while it goes on. An end within a call is none by a call: its arguments are torn."""
        reason = self.reasons[choice]
        is_torn = self._parsers is not None and self._parsers[choice].is_torn
        return None if reason is None else finish_word(reason, has_calls=self._has_calls[choice] and not is_torn)

    def stop_string(self, choice: int) -> str | None:
        """The stop string that ended a choice; None where none did."""
        return self._backends[choice].stop_string

    def skip(self, choice: int, token_ids: Sequence[int], *, is_all: bool = False) -> None:
        """The first tokens of a choice, or all of them: somebody else has given out what they say."""
        text = self._backends[choice].push(token_ids)
        delta = text.delta + (self._backends[choice].finish() if is_all and not text.stopped else "")
        self.num_tokens += text.accepted
        self._has_echoed[choice] = True
        self._parse(choice, delta, is_last=is_all)
        self._is_told[choice] = is_all

    def push(self, chunks: Sequence[TokenChunk]) -> list[Piece]:
        """The pieces that these tokens make certain; where tokens are told, all of them, with or without text."""
        pieces: list[Piece] = []
        for chunk in chunks:
            token_ids = chunk.token_ids
            if self._by_token and len(token_ids) > 1:
                for token_id in token_ids[:-1]:
                    self._push(pieces, chunk.choice, (token_id,), None)
                token_ids = token_ids[-1:]
            self._push(pieces, chunk.choice, token_ids, chunk.finish_reason)
        return pieces

    def _push(self, pieces: list[Piece], choice: int, token_ids: Sequence[int], reason: FinishReason | None) -> None:
        if self.reasons[choice] is not None:
            return
        text = self._backends[choice].push(token_ids, reason)
        self.num_tokens += text.accepted
        told = token_ids[: text.accepted] if self._tells_tokens else ()
        delta = text.delta
        if not self._has_echoed[choice]:
            delta, self._has_echoed[choice] = self._echo + delta, True
        if reason is not None and not text.stopped:
            delta += self._backends[choice].finish()
        if self.stop_string(choice) is not None:  # the log ends here too: the decode worker found the same one
            reason = FinishReason.STOP
        if reason in FINISH_WORDS:  # else it was cancelled or failed: the end of the request tells
            self.reasons[choice] = reason
        parts = self._parse(choice, delta, is_last=reason is not None)
        if parts is not None:
            delta = ""
        if delta or told or parts or self.reasons[choice] is not None:
            pieces.append(Piece(choice, delta, told, self.reasons[choice], parts))

    def _parse(self, choice: int, delta: str, *, is_last: bool) -> list[Part] | None:
        if self._parsers is None or self._is_told[choice]:
            return None
        parser = self._parsers[choice]
        parts = parser.push(delta)
        if is_last:
            parts += parser.finish()
        self._has_calls[choice] |= any(part.kind is PartKind.CALL for part in parts)
        return parts


def echo_of(tokenizer: Tokenizer | NoTokenizer, request: Request) -> str:
    """The prompt's text, as its tokens say it."""
    return "" if isinstance(tokenizer, NoTokenizer) else tokenizer.decode(request.input.token_ids)
