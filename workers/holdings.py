"""The deliveries that one worker holds: what each needs, how far it is, and how its handler learns that it is over."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import Any

import structlog

from pipeline.errors import EngineError
from pipeline.labels import log_fields
from pipeline.protocol import FinishReason, KVHandle, LLMEngineOutput, Log, Request
from pipeline.queue import Delivery


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What a handler gets: one stage's share of a request."""

    delivery: Delivery
    request: Request
    handle: KVHandle | None

    @property
    def log(self) -> Log:
        """Tokens so far."""
        return self.delivery.log


class Held:
    """One delivery in work. Its owner is the worker's `Holdings`; the step writer moves it on."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.id, self.epoch, self.api, self.key = (
            task.delivery.id,
            task.delivery.epoch,
            task.delivery.api,
            task.delivery.key,
        )
        self.started_s = time.monotonic()
        self.lengths = [len(tokens) for tokens in task.log.tokens]
        self.open = {choice for choice, reason in enumerate(task.log.finished) if reason is None}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress = asyncio.Event()  # a token was logged, or it is over
        self.job: asyncio.Task[Any] | None = None
        self.dropped = ""  # why this delivery is not ours any more
        self.is_settling = False  # its handler is done: what is left to say frees what it holds, and is not interrupted

    def bound(self) -> contextlib.AbstractContextManager[None]:
        """Lines that are logged meanwhile, and by what is begun meanwhile, have its client's label."""
        return structlog.contextvars.bound_contextvars(**log_fields(self.task.request.input))

    def blocks(self, block_size: int) -> int:
        """Upper bound of the blocks that it may use in its next step, sharing left out."""
        prompt = self.task.delivery.prompt_tokens
        return sum((prompt + length) // block_size + 1 for length in self.lengths)

    def advance(self, output: LLMEngineOutput) -> None:
        """A logged output: the choice is longer, or over."""
        self.lengths[output.choice] = output.index + len(output.token_ids)
        if output.finish_reason is not None:
            self.open.discard(output.choice)
        if not self.open and not self.complete.done():
            self.complete.set_result(None)
        self.progress.set()

    def fail(self, error: EngineError) -> None:
        """The engine cannot go on with it."""
        if not self.complete.done():
            self.complete.set_exception(error)
            self.complete.exception()  # the handler may not be waiting for it yet
        self.progress.set()

    def drop(self, why: str) -> None:
        """It is not ours any more: stop its handler, say nothing."""
        self.dropped = self.dropped or why
        if self.job is not None and not self.is_settling:
            self.job.cancel()


class Holdings:
    """All deliveries of one worker by their key."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    def add(self, held: Held) -> None:
        """Take a delivery in. One of the same name is of an epoch that Redis lost and gave again: it is not ours any more."""
        if (before := self._held.get(held.key)) is not None:
            before.drop("Redis lost its epoch")
        self._held[held.key] = held

    def remove(self, held: Held) -> None:
        """Let it go; a later delivery of the same request stays."""
        if self._held.get(held.key) is held:
            del self._held[held.key]

    def get(self, key: str) -> Held | None:
        """A delivery, if it is held. Engines know a delivery by its key: it is their request id."""
        return self._held.get(key)

    def all(self) -> list[Held]:
        """A copy, for loops that change what is held."""
        return list(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def has_suspect(self) -> bool:
        """Whether a delivery is held that must run alone."""
        return any(held.task.delivery.is_suspect for held in self._held.values())

    def choices(self) -> int:
        """Sequences that are held: open choices of all deliveries."""
        return sum(len(held.open) for held in self._held.values())

    def prompt_tokens(self) -> int:
        """Prompt tokens of all deliveries."""
        return sum(held.task.delivery.prompt_tokens for held in self._held.values())

    def blocks(self, block_size: int) -> int:
        """Upper bound of the blocks in use by all deliveries."""
        return sum(held.blocks(block_size) for held in self._held.values())


def is_logged(output: LLMEngineOutput) -> bool:
    """Whether an output belongs in the log: errors do not."""
    return output.finish_reason is not FinishReason.ERROR
