"""Answers that follow a grammar, by llguidance: compiled beside the steps, one matcher a choice, the masks of a step in one call.

1. A grammar is compiled in a thread, or found among the last ones; each choice gets a copy, led through the log of the choice.
2. Before a token is chosen the matcher takes in what came since, and its mask leaves only what may follow.
3. Where nothing may follow, the mask leaves the end tokens: the answer ends.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from pipeline.config import PoolSettings
from pipeline.errors import ConfigError, Unservable
from pipeline.grammars import grammar_of, shortened
from pipeline.protocol import BackendInput
from pipeline.tokenizer import Tokenizer
from workers.engines.paged.runner import RowFailure

KEPT = 64  # compiled grammars
_BYTES = np.arange(256, dtype=np.uint8)[:, None]
LIMITS = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), np.float32(np.inf), np.float32(-np.inf))
"""For each byte of a mask, what the eight logits that it stands for are limited to."""
Bits = NDArray[np.int32]


class Grammars:
    """The grammars of an engine over one tokenizer. `constrain` may be called by several threads at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises `Unservable` for a tokenizer that llguidance cannot read, or without an end token."""
        if not tokenizer.eos_token_ids:
            raise Unservable("its tokenizer names no token that ends an answer")
        size = max(vocab_size, tokenizer.known_tokens)
        try:
            self._tokenizer = LLTokenizer(tokenizer.as_json(), n_vocab=size, eos_token=tokenizer.eos_token_ids)
        except ValueError as error:
            raise Unservable(f"llguidance cannot read its tokenizer: {shortened(str(error))}") from error
        self.end_token_ids = tokenizer.eos_token_ids
        self.executor = LLExecutor()
        self.words = -(-size // 32)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constrain(self, request: BackendInput, logs: Mapping[int, Sequence[int]]) -> dict[int, GrammarConstraint]:
        """The request's grammar for each choice of `logs`, behind its log. Raises `Unservable` where there is none, or a log leaves it."""
        guided = request.sampling_options.guided_decoding
        assert guided is not None
        try:
            matcher = self._matcher(grammar_of(guided))
        except ValueError as error:
            raise Unservable(
                f"request {request.request_id}: guided_decoding: no answer can follow it: {shortened(str(error))}"
            ) from error
        return {choice: self._behind(matcher.deep_copy(), request, choice, log) for choice, log in logs.items()}

    def _matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning, to be copied. Raises `ValueError`."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _behind(self, matcher: LLMatcher, request: BackendInput, choice: int, log: Sequence[int]) -> GrammarConstraint:
        taken = matcher.try_consume_tokens(list(log))
        has_ended = list(log[taken:]) in ([token] for token in self.end_token_ids) and matcher.is_accepting()
        if taken < len(log) and not has_ended:
            raise Unservable(
                f"request {request.request_id}, choice {choice}: token {log[taken]} at index {taken} of the log is not "
                "what the request's grammar allows"
            )
        return GrammarConstraint(self, matcher, len(log))


class GrammarConstraint:
    """A `Constraint`: the matcher of one choice, behind the first `followed` tokens of its output."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher, followed: int) -> None:
        self.grammars = grammars
        self.matcher = matcher
        self._followed = followed

    @property
    def end_token_ids(self) -> Sequence[int]:
        """See `Constraint.end_token_ids`."""
        return self.grammars.end_token_ids

    def follow(self, output: Sequence[int]) -> None:
        """See `Constraint.follow`. A matcher that has failed stays so, and says why when its mask is asked for."""
        self.matcher.consume_tokens(list(output[self._followed :]))
        self._followed = len(output)


def mask(logits: torch.Tensor, rows: Sequence[tuple[int, GrammarConstraint]]) -> dict[int, RowFailure]:
    """Leave in these rows of `logits` [rows, vocabulary], which are changed, only what may come next; returns those where that failed."""
    grammars = rows[0][1].grammars
    bits = np.zeros((len(rows), grammars.words), dtype=np.int32)
    matchers = [constraint.matcher for _, constraint in rows]
    fill_next_token_bitmask_par(grammars.executor, list(zip(matchers, range(len(rows)), strict=True)), bits)
    indices = [row for row, _ in rows]
    leave(logits, indices, bits)
    return {
        row: RowFailure(f"its grammar cannot go on: {shortened(matcher.get_error())}")
        for row, matcher in zip(indices, matchers, strict=True)
        if matcher.is_error()
    }


def leave(logits: torch.Tensor, rows: Sequence[int], bits: Bits) -> None:
    """Set to minus infinity in these ascending rows of `logits` what has no bit, the lowest bit first.

    As a minimum with plus or minus infinity: filling by a mask looks at each number for itself, which takes a CPU three to ten times as
    long.
    """
    if logits.device.type == "cpu":
        leave_on_cpu(logits, rows, bits)
        return
    limits = limits_of(bits, logits.device)[:, : logits.shape[-1]]
    if rows[-1] - rows[0] + 1 == len(rows):
        run = logits[rows[0] : rows[-1] + 1]
        torch.minimum(run, limits, out=run)
    else:
        logits[list(rows)] = torch.minimum(logits[list(rows)], limits)


def leave_on_cpu(logits: torch.Tensor, rows: Sequence[int], bits: Bits) -> None:
    """`leave`, a row at a time, which fits into a cache; limits come eight at a time out of a table that does, too."""
    limits = torch.empty(bits.shape[-1] * 4, 8)
    for row, row_bits in zip(rows, bits, strict=True):
        np.take(LIMITS, row_bits.view(np.uint8), axis=0, out=limits.numpy(), mode="clip")
        torch.minimum(logits[row], limits.view(-1)[: logits.shape[-1]], out=logits[row])


def limits_of(bits: Bits, device: torch.device) -> torch.Tensor:
    """Infinity where there is a bit, minus infinity elsewhere."""
    words = torch.from_numpy(bits).to(device, non_blocking=True)
    flags = ((words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1).flatten(1)
    return flags.float().sub_(0.5).mul_(torch.inf)


def grammars_of(pool: PoolSettings, vocab_size: int) -> Grammars:
    """The grammars of a pool's model. Raises `Unservable` saying why it has none."""
    if not pool.has_tokenizer:
        raise Unservable("the pool is served without a tokenizer")
    try:
        return Grammars(Tokenizer.load(pool.tokenizer_source), vocab_size)
    except ConfigError as error:
        raise Unservable(str(error)) from error
