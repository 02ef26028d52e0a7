"""What an answer is made of: the items of a request's stream, interruptible, and the texts of its choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from api.sse import FINISH_WORDS, tells_tokens
from pipeline.backend import Backend
from pipeline.errors import Draining
from pipeline.protocol import FinishReason, Request
from pipeline.stream import RequestStream, TokenChunk
from pipeline.tokenizer import NoTokenizer, Tokenizer

Piece = tuple[
    int, str, Sequence[int], FinishReason | None
]  # choice, text (may be empty), tokens where they are told, why the choice is over


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
        """As `next`, but waits until there is a token, so that what fails before it can still be answered with a status."""
        waiting: list[TokenChunk] = []
        while (chunks := await self.next()) is not None:
            waiting += chunks
            if any(chunk.token_ids for chunk in chunks):
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
    """The text of all choices of a request, and their tokens where it wants them told; `by_token`: each token is a piece of its own,
    however many came together."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, request: Request, *, by_token: bool) -> None:
        self._backends = [Backend(tokenizer, request.input) for _ in range(request.input.sampling_options.n)]
        self._by_token = by_token
        self._tells_tokens = tells_tokens(request)
        self.reasons: list[FinishReason | None] = [None] * len(self._backends)

    @property
    def are_complete(self) -> bool:
        """Whether every choice has come to its end."""
        return None not in self.reasons

    def skip(self, choice: int, token_ids: Sequence[int]) -> None:
        """The first tokens of a choice, whose text somebody else has given out."""
        self._backends[choice].push(token_ids)

    def push(self, chunks: Sequence[TokenChunk]) -> list[Piece]:
        """The pieces of text that these tokens make certain; where tokens are told, all of them, with or without text."""
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
        told = token_ids[: text.accepted] if self._tells_tokens else ()
        if text.stopped:  # the log ends here too: the decode worker found the same stop string
            reason = FinishReason.STOP
        if reason is not None:
            pieces.append(self._finish(choice, text.delta, told, reason, is_cut=text.stopped))
        elif text.delta or told:
            pieces.append((choice, text.delta, told, None))

    def _finish(self, choice: int, delta: str, told: Sequence[int], reason: FinishReason, *, is_cut: bool) -> Piece:
        if not is_cut:
            delta += self._backends[choice].finish()
        if reason not in FINISH_WORDS:  # cancelled or failed: the end of the request tells
            return (choice, delta, told, None)
        self.reasons[choice] = reason
        return (choice, delta, told, reason)
