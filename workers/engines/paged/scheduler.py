"""What a step computes, decided anew for each one from the sequences and the blocks at hand. No clock, no waiting, no bytes.

In this order, within a budget of tokens:
1. each running sequence that lacks one token gets it: whatever else happens, answers go on;
2. running sequences that lack more (prompts, recomputed logs) go on in chunks, oldest first;
3. waiting sequences join, first come first served, once the blocks for all that they lack are there.
Where blocks run out, the latest arrival gives up its own and waits: it will compute its tokens again.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from workers.engines.paged.blocks import BlockPool, new_table
from workers.engines.paged.sequence import Place, Sequence


@dataclass(slots=True)
class ScheduledRow:
    """`count` tokens of a sequence from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether it reaches the end of the sequence, so that a token follows."""
        return self.start + self.count == self.sequence.length


@dataclass(slots=True)
class Step:
    """The decision. `admitted` are sequences that left the queue; those to fetch have no row yet."""

    rows: list[ScheduledRow] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the running sequences and their block tables."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self._fetching: list[Sequence] = []

    @property
    def running(self) -> int:
        """Choices in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Choices that wait: for blocks, for a place, for their fetch or for their leader."""
        unled = sum(len(leader.followers) for leader in (*self._waiting, *self._fetching, *self._running))
        return len(self._waiting) + len(self._fetching) + unled

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        sequence.place = Place.WAITING
        self._waiting.append(sequence)

    def join(self, sequence: Sequence) -> None:
        """A fetch is complete: from the next step on the sequence runs with the blocks that it has."""
        self._fetching.remove(sequence)
        self._run(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence leaves for good and gives up its blocks. Not while a step that writes to them is being computed."""
        self.leave(sequence)
        self.release(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence is scheduled no more, but keeps its blocks; where others follow it, the first of them takes them over."""
        match sequence.place:
            case Place.WAITING:
                self._leave_group(self._waiting, sequence)
            case Place.RUNNING:
                self._leave_group(self._running, sequence)
            case Place.FETCHING:
                self._leave_group(self._fetching, sequence)
            case Place.FOLLOWING:
                assert sequence.leader is not None
                sequence.leader.followers.remove(sequence)
                sequence.leader = None
            case Place.GONE:
                pass
        sequence.place = Place.GONE

    def release(self, sequence: Sequence) -> None:
        """Give up the blocks of a sequence."""
        self._pool.release(sequence.table)
        sequence.table = new_table()

    def fork(self, leader: Sequence) -> list[tuple[int, int]]:
        """The leader has the prompt's blocks: its followers share the full ones. Returns the blocks to copy, (source, target).

        A follower for whose copy of the last, partly filled block there is no room waits as if preempted.
        """
        copies: list[tuple[int, int]] = []
        full, partial = divmod(leader.prompt_length, self._pool.block_size)
        for follower in leader.followers:
            follower.reached = leader.prompt_length
            own = self._pool.allocate(1) if partial else []
            if own is None:
                self._requeue(follower)
                continue
            shared = leader.table[:full]
            self._pool.share(shared)
            follower.table = shared + new_table(own)
            follower.computed = min(leader.prompt_length, follower.length - 1)
            copies += [(leader.table[full], block) for block in own]
            self._run(follower)
        leader.followers = []
        return copies

    def schedule(self) -> Step:
        """Decide the next step. Every row's blocks are allocated when this returns."""
        step = Step()
        prefilling: list[Sequence] = []
        for sequence in list(self._running):
            if sequence.length - sequence.computed > 1:
                prefilling.append(sequence)
            elif sequence.place is Place.RUNNING:
                self._schedule_decoding(sequence, step)
        budget = self._max_num_batched_tokens - len(step.rows)
        for sequence in prefilling:
            if budget > 0 and sequence.place is Place.RUNNING:
                budget -= self._schedule_chunk(sequence, budget, step)
        if not step.preempted:
            self._admit(budget, step)
        return step

    def _schedule_decoding(self, sequence: Sequence, step: Step) -> None:
        end = sequence.computed + 1
        while not self._cover(sequence, end):
            victim = self._running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return
        step.rows.append(ScheduledRow(sequence, sequence.computed, 1))

    def _schedule_chunk(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Rows for as much as budget and blocks allow; returns the tokens taken."""
        while True:
            room = len(sequence.table) * self._pool.block_size + self._pool.free * self._pool.block_size
            count = min(sequence.length - sequence.computed, budget, room - sequence.computed)
            if count > 0:
                self._cover(sequence, sequence.computed + count)
                step.rows.append(ScheduledRow(sequence, sequence.computed, count))
                return count
            victim = self._running[-1]
            if victim is sequence or any(row.sequence is victim for row in step.rows):
                return 0
            self._preempt(victim, step)

    def _admit(self, budget: int, step: Step) -> None:
        """Let the queue in while its head has a place, blocks and budget; nobody overtakes."""
        taken = len(self._running) + len(self._fetching)
        taken += sum(len(leader.followers) for leader in (*self._running, *self._fetching))
        while self._waiting and budget > 0:
            sequence = self._waiting[0]
            taken += 1 + len(sequence.followers)
            if taken > self._max_num_seqs or not self._fits(sequence):
                return
            self._waiting.popleft()
            self._take_prefix(sequence)
            step.admitted.append(sequence)
            if sequence.fetch_tokens:
                self._cover(sequence, sequence.fetch_tokens)
                sequence.place = Place.FETCHING
                self._fetching.append(sequence)
            else:
                self._run(sequence)
                budget -= self._schedule_chunk(sequence, budget, step)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the blocks for all its tokens and the next one are there, counting those that it would find in the cache."""
        known, unheld = self._pool.peek(self._findable(sequence))
        needed = self._pool.blocks_for(sequence.length + (not sequence.to_export)) - known
        return needed <= self._pool.free - unheld

    def _take_prefix(self, sequence: Sequence) -> None:
        found = self._pool.match(self._findable(sequence))
        sequence.table = new_table(found)
        sequence.computed = len(found) * self._pool.block_size

    def _findable(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that may come from the cache: never the one of the last token, whose logits are needed; none where those of
        the prompt are."""
        if not self._pool.prefix_cache or (sequence.scores is not None and not sequence.scores.is_complete):
            return []
        return sequence.block_hashes(sequence.length - 1, self._pool.block_size)

    def _cover(self, sequence: Sequence, end: int) -> bool:
        """Make the table hold `end` tokens; False (and nothing taken) where blocks lack."""
        missing = self._pool.blocks_for(end) - len(sequence.table)
        if missing <= 0:
            return True
        blocks = self._pool.allocate(missing)
        if blocks is None:
            return False
        sequence.table.extend(blocks)
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._running.remove(sequence)
        self._requeue(sequence)
        step.preempted.append(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Back to the queue, before all that came later; its tokens are kept, its blocks are not."""
        self.release(sequence)
        sequence.computed = 0
        sequence.fetch_tokens = 0
        sequence.leader = None
        sequence.place = Place.WAITING
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)

    def _run(self, sequence: Sequence) -> None:
        sequence.place = Place.RUNNING
        sequence.leader = None
        insort(self._running, sequence, key=lambda running: running.order)

    def _leave_group(self, group: deque[Sequence] | list[Sequence], sequence: Sequence) -> None:
        if sequence.followers:
            group[group.index(sequence)] = self._promote_heir(sequence)
        else:
            group.remove(sequence)

    def _promote_heir(self, leader: Sequence) -> Sequence:
        """The leader goes before its followers have the prompt: the first goes on in its place, with its blocks."""
        heir, *others = leader.followers
        heir.leader, heir.followers, leader.followers = None, others, []
        for other in others:
            other.leader = heir
        heir.place = leader.place
        heir.table, leader.table = leader.table, new_table()
        heir.computed, heir.reached = min(leader.computed, heir.length - 1), leader.reached
        heir.hashes = leader.hashes[: heir.prompt_length // self._pool.block_size]
        heir.fetch_tokens = leader.fetch_tokens
        return heir
