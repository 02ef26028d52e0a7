"""The state of one choice in an engine, and the rule that says when it ends."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

from pipeline.protocol import BackendInput, FinishReason
from workers.engines.paged.blocks import chain_hash, new_table, root_hash
from workers.engines.paged.prompts import PromptScores
from workers.engines.paged.runner import Draw
from workers.engines.paged.shaping import Constraint, Shaping, shaping_of


class Place(enum.Enum):
    """Where a sequence is."""

    FOLLOWING = "following"  # waits for its leader to have the prompt's blocks
    WAITING = "waiting"
    FETCHING = "fetching"  # holds blocks that a transfer is filling
    RUNNING = "running"
    GONE = "gone"  # scheduled no more; may hold blocks that a step or a transfer still uses


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice: its tokens, and the blocks that hold the keys and values of the first `computed` of them.

    Of the choices of a request one leads: it computes the prompt, then its `followers` take the prompt's blocks by
    reference. A sequence `to_export` computes the prompt only.
    """

    request: BackendInput
    choice: int
    arrival: int  # order among requests of this engine
    output: list[int]
    to_export: bool = False
    to_sample: bool = True
    place: Place = Place.WAITING
    table: array[int] = field(default_factory=new_table)
    computed: int = 0
    reached: int = 0  # the most that `computed` ever was: below it, computing is computing again
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks known so far
    leader: Sequence | None = None  # while FOLLOWING
    followers: list[Sequence] = field(default_factory=list)
    fetch_tokens: int = 0  # tokens whose blocks come from a handle, on first admission
    constraint: Constraint | None = None
    scores: PromptScores | None = None  # the same for all choices, where something is to be told of the prompt
    shaping: Shaping | None = field(init=False)

    def __post_init__(self) -> None:
        self.shaping = shaping_of(self.request, self.output, self.constraint)

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served; choices of a request in their order."""
        return self.arrival, self.choice

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.request.token_ids) + len(self.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions `start` to `end`."""
        prompt = self.request.token_ids
        offset = start - len(prompt)
        if offset >= 0:
            return self.output[offset : end - len(prompt)]
        if end <= len(prompt):
            return prompt[start:end]
        return prompt[start:] + self.output[: end - len(prompt)]

    def block_hashes(self, num_tokens: int, block_size: int) -> list[bytes]:
        """Chained hashes of the full blocks within the first `num_tokens` tokens."""
        full = num_tokens // block_size
        hashes = self.hashes
        while len(hashes) < full:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else root_hash(salt_of(self.request))
            hashes.append(chain_hash(parent, self.tokens(start, start + block_size)))
        return hashes[:full]

    def samplers(self) -> list[Sequence]:
        """The choices whose next token comes from the last position of this sequence."""
        if not self.to_sample:
            return []
        if self.output:
            return [self]
        return [self, *(follower for follower in self.followers if not follower.output)]

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Why the choice has ended, or None."""
        ends = self.constraint.end_token_ids if self.constraint is not None else ()
        return finish_reason(self.request, self.output, max_model_len, ends)

    def draw(self) -> Draw:
        """How the next token of this choice is to be chosen."""
        stop = self.request.stop_conditions
        early = stop.min_tokens is not None and len(self.output) < stop.min_tokens
        banned = (*self.request.eos_token_ids, *(stop.stop_token_ids or ())) if early else ()
        eos = tuple(self.request.eos_token_ids)
        return Draw(self.request.sampling_options, self.choice, len(self.output), banned, eos, self.shaping)


def salt_of(request: BackendInput) -> str:
    """What keeps the blocks of this request apart from those of others with equal tokens."""
    if request.routing is None:
        return "\0"
    return f"{request.routing.lora_name or ''}\0{request.routing.cache_salt or ''}"


def finish_reason(
    request: BackendInput, output: list[int], max_model_len: int, end_token_ids: Collection[int] = ()
) -> FinishReason | None:
    """Why a choice with this output has ended, or None. The token that ends it is part of the output.

    Behind a grammar nothing may follow, whatever is asked for: there the request's end tokens end, and `end_token_ids`, the grammar's.
    """
    stop = request.stop_conditions
    is_guided = request.sampling_options.guided_decoding is not None
    if output and is_guided and (output[-1] in request.eos_token_ids or output[-1] in end_token_ids):
        return FinishReason.EOS
    if output and len(output) >= (stop.min_tokens or 0):
        if not stop.ignore_eos and output[-1] in request.eos_token_ids:
            return FinishReason.EOS
        if stop.stop_token_ids and output[-1] in stop.stop_token_ids:
            return FinishReason.STOP
    if stop.max_tokens is not None and len(output) >= stop.max_tokens:
        return FinishReason.LENGTH
    if len(request.token_ids) + len(output) >= max_model_len:
        return FinishReason.LENGTH
    return None
