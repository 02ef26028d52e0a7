"""What shapes the next token of a choice beyond temperature and cuts: penalties, a bias, a grammar; and what is told of it.

Most choices have none of it, and cost nothing for it. What depends on the tokens so far follows the choice's output as it grows,
and the output of a resumed choice begins with its log: so nothing here depends on where and how often a request was begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Unservable
from pipeline.protocol import BackendInput, SamplingOptions

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


class Constraint(Protocol):
    """The grammar of one choice, which stands behind the tokens that it was told."""

    @property
    def end_token_ids(self) -> Sequence[int]:
        """The tokens that come where the grammar is complete, and never before."""
        ...

    def follow(self, output: Sequence[int]) -> None:
        """Go on by what the output has more than when it was last told; errors show when the next token is chosen."""
        ...


class TokenCounts:
    """The distinct tokens of a choice: `ids`, and how many `times` each is in its output, 0 for those of the prompt alone.

    Counting a token takes the same time however many there are. `earlier`: the output before the one that is followed.
    """

    def __init__(self, prompt: Sequence[int] = (), earlier: Sequence[int] = ()) -> None:
        distinct = np.unique(np.array(prompt, dtype=np.int64))
        self._ids: Ids = distinct
        self._times: Values = np.zeros(len(distinct), dtype=np.float32)
        self._slots = {token: slot for slot, token in enumerate(distinct.tolist())}
        self._followed = 0
        for token in earlier:
            self._add(token)

    @property
    def ids(self) -> Ids:
        """Token ids, each once."""
        return self._ids[: len(self._slots)]

    @property
    def times(self) -> Values:
        """As long as `ids`."""
        return self._times[: len(self._slots)]

    def follow(self, output: Sequence[int]) -> None:
        """Count what is new; a negative id holds the place of a token that is not known yet, so nothing behind it is."""
        while self._followed < len(output) and output[self._followed] >= 0:
            self._add(output[self._followed])
            self._followed += 1

    def _add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            more = max(64, slot)
            self._ids = np.concatenate((self._ids, np.zeros(more, dtype=np.int64)))
            self._times = np.concatenate((self._times, np.zeros(more, dtype=np.float32)))
        self._ids[slot] = token
        self._times[slot] += 1


@dataclass(slots=True, eq=False)
class Shaping:
    """See the module's docstring. `output` is the choice's own list and grows between steps."""

    options: SamplingOptions
    output: list[int]
    counts: TokenCounts | None  # where there are penalties
    bias: tuple[Ids, Values] | None
    constraint: Constraint | None
    logprobs: int | None  # likeliest tokens that are told with each; None: nothing is told

    def follow(self) -> None:
        """Take in the tokens since the last time."""
        if self.counts is not None:
            self.counts.follow(self.output)
        if self.constraint is not None:
            self.constraint.follow(self.output)


def shaping_of(request: BackendInput, output: list[int], constraint: Constraint | None) -> Shaping | None:
    """What shapes a choice of this request, None where nothing does."""
    options, logprobs = request.sampling_options, request.output_options.logprobs
    counts, bias = counts_of(options, request.token_ids), bias_of(request)
    if counts is None and not bias and constraint is None and logprobs is None:
        return None
    ids, values = np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)
    return Shaping(options, output, counts, (ids, values) if bias else None, constraint, logprobs)


def counts_of(options: SamplingOptions, prompt: Sequence[int], earlier: Sequence[int] = ()) -> TokenCounts | None:
    """What the penalties look at, None where there are none. Only the repetition penalty sees the prompt."""
    if options.repetition_penalty != 1:
        return TokenCounts(prompt, earlier)
    if options.presence_penalty != 0 or options.frequency_penalty != 0:
        return TokenCounts((), earlier)
    return None


def bias_of(request: BackendInput) -> dict[int, float]:
    """OpenAI's `logit_bias` has token ids as strings. Raises `Unservable` for a key that is none."""
    bias = request.sampling_options.logit_bias or {}
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise Unservable(f"request {request.request_id}: logit_bias: {error}") from None
