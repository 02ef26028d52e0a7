"""The contract of a runner: what computes a step. It owns the bytes of the blocks and knows nothing of requests or waiting."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from pipeline.protocol import BackendInput, SamplingOptions
from workers.engines.paged.prompts import Asked
from workers.engines.paged.shaping import Constraint, Shaping
from workers.transfer import Memory


class Draw(msgspec.Struct, frozen=True, gc=False):
    """How one token is chosen. Equal (seed, choice, index) over equal logits give the equal token, alone or in a batch."""

    options: SamplingOptions
    choice: int
    index: int  # of the token in its choice's log
    banned: tuple[int, ...]  # ids that may not come now
    eos_token_ids: tuple[int, ...]
    shaping: Shaping | None = None  # where more than the options decides, or log probabilities are told


class Row(msgspec.Struct, frozen=True, gc=False):
    """A run of tokens of one sequence: `token_ids` stand at positions `start`, `start + 1`, ...

    The runner writes their keys and values into the blocks of `table`, where those of all positions before `start`
    already are, and chooses one token for each of `draws` from the logits of the last position. Where `asked` is there, it leaves in
    it what it asks for.
    """

    token_ids: list[int]
    start: int
    table: array[int]
    draws: list[Draw]
    asked: Asked | None = None


class RowFailure(msgspec.Struct, frozen=True):
    """No token could be chosen; the message says why. The other rows of the step are sound."""

    message: str


class Scored(msgspec.Struct, frozen=True):
    """A token with its log probability, and the likeliest tokens at its place, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


Chosen = int | Scored | RowFailure  # scored where its draw asks for log probabilities


class RunnerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is once started."""

    name: str
    model: str
    layout: str  # fingerprint of weights, dtype, block size and order within a block
    block_size: int
    num_blocks: int
    block_nbytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_cache: bool
    vocab_size: int  # logits of a position
    scores_prompts: bool = True  # whether it answers what a row asks of its prompt


class Runner(Protocol):
    """See the module's docstring. `run` is never called twice at once; the rest may be called beside it for other blocks."""

    async def start(self) -> RunnerInfo:
        """Load the model and take the memory of all blocks. Raises `Unservable` naming what it cannot serve."""
        ...

    async def run(self, rows: Sequence[Row]) -> list[Chosen]:
        """Compute a step; returns one token for each draw, in order of rows and draws. Leaves the event loop free."""
        ...

    async def constrain(self, request: BackendInput, logs: Mapping[int, Sequence[int]]) -> Mapping[int, Constraint]:
        """The grammar of a request that has one, for each choice of `logs`, behind its log. Leaves the event loop and steps free.

        Raises `Unservable` where it is no grammar, where a log leaves it, and where the model has none.
        """
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the bytes of a block. During `run` only for blocks that none of its rows uses."""
        ...

    def clear(self, blocks: Sequence[int]) -> None:
        """Set the bytes of these blocks to zero: what is not a number in them would spoil their next owner."""
        ...

    @property
    def device(self) -> int | None:
        """The GPU that the blocks lie on; known after `start`."""
        ...

    def gather(self, blocks: Sequence[int], out: Memory) -> None:
        """Write the bytes of these blocks, in order, into `out`. Called from any thread."""
        ...

    def scatter(self, data: Memory, blocks: Sequence[int]) -> None:
        """Fill these blocks, in order, from `data`. Called from any thread."""
        ...

    async def close(self) -> None:
        """Give the memory back. May be called twice."""
        ...
