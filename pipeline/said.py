"""What is read of what a worker says of itself: each reader takes what it needs, and a worker of another version may say less."""

from __future__ import annotations

import msgspec

from pipeline.protocol import UNREADABLE


class SaidOfEngine(msgspec.Struct, frozen=True):
    """What an engine can hold; 0 is what was not said."""

    num_blocks: int = 0
    block_size: int = 0
    max_num_seqs: int = 0


class SaidOfWork(msgspec.Struct, frozen=True):
    """What an engine does. `steps`, `busy_s` and the tokens only grow; `step_ms` is a moving average."""

    running: int = 0
    blocks_used: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens_computed: int = 0
    output_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    step_ms: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts that it has seen, those that it found in its prefix cache included."""
        return self.prefix_hit_tokens + self.prompt_tokens_computed


class WorkerSaid(msgspec.Struct, frozen=True):
    """`total_blocks`: of the largest task that it could start (None: it has not said); `paused`: it was told to claim nothing; `leaving`:
    it finishes what it holds, then ends."""

    total_blocks: int | None = None
    engine: SaidOfEngine = SaidOfEngine()
    stats: SaidOfWork = SaidOfWork()
    paused: bool = False
    leaving: bool = False

    @property
    def claims(self) -> bool:
        """Whether it takes what waits."""
        return not self.paused and not self.leaving


def said_by(info: bytes) -> WorkerSaid:
    """Of what cannot be read nothing was said."""
    try:
        return msgspec.json.decode(info, type=WorkerSaid)
    except UNREADABLE:
        return WorkerSaid()
