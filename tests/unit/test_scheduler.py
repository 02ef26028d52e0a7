"""What a step computes: order, budget, blocks, preemption."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.protocol import BackendInput, SamplingOptions, StopConditions
from workers.engines.paged.blocks import BlockPool
from workers.engines.paged.scheduler import Scheduler, Step
from workers.engines.paged.sequence import Place, Sequence

BLOCK = 4


def new_sequence(arrival: int, prompt: int, n: int = 1, **fields: object) -> Sequence:
    """A leader with n - 1 followers; prompts of different arrivals have nothing in common."""
    request = BackendInput(
        request_id=f"r{arrival}",
        model="m",
        token_ids=[arrival * 1000 + position for position in range(prompt)],
        stop_conditions=StopConditions(),
        sampling_options=SamplingOptions(n=n),
    )
    leader, *followers = [Sequence(request, choice, arrival, output=[], **fields) for choice in range(n)]  # type: ignore[arg-type]
    for follower in followers:
        follower.place, follower.leader = Place.FOLLOWING, leader
    leader.followers = followers
    return leader


class Run:
    """Commits steps as an engine would: each sequence whose row reaches its end gets a token."""

    def __init__(self, num_blocks: int, *, max_num_seqs: int = 8, budget: int = 16, prefix_cache: bool = True) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.budget = budget
        self.ended: list[Sequence] = []

    def step(self, max_tokens: int = 1_000_000) -> Step:
        running = [s for s in self.scheduler._running if s.length - s.computed == 1]
        step = self.scheduler.schedule()
        self.check(step, running)
        for row in step.rows:
            sequence = row.sequence
            before, sequence.computed = sequence.computed, row.start + row.count
            hashes = sequence.block_hashes(sequence.computed, BLOCK)
            for index in range(before // BLOCK, sequence.computed // BLOCK):
                self.pool.publish(sequence.table[index], hashes[index])
            samplers = sequence.samplers() if sequence.computed == sequence.length else []
            for sampler in samplers:
                sampler.output.append(7)
            if sequence.followers and sequence.computed >= sequence.prompt_length:
                self.scheduler.fork(sequence)
            for sampler in samplers:
                if len(sampler.output) >= max_tokens and sampler.place is not Place.GONE:
                    self.scheduler.finish(sampler)
                    self.ended.append(sampler)
        self.pool.check_integrity()
        return step

    def check(self, step: Step, running: list[Sequence]) -> None:
        assert self.pool.used <= self.pool.num_blocks
        assert sum(row.count for row in step.rows) <= self.budget
        scheduled = {id(row.sequence) for row in step.rows}
        preempted = {id(sequence) for sequence in step.preempted}
        assert len(scheduled) == len(step.rows), "a sequence has two rows"
        assert not scheduled & preempted
        assert {id(sequence) for sequence in running} <= scheduled | preempted, "a running sequence got no token"
        for row in step.rows:
            assert row.start == row.sequence.computed
            assert row.count > 0
            assert row.start + row.count <= len(row.sequence.table) * BLOCK


def test_every_running_sequence_has_its_token_before_prompts_share_what_is_left() -> None:
    run = Run(64)
    for arrival in range(3):
        run.scheduler.add(new_sequence(arrival, 4))
    run.step()
    run.scheduler.add(new_sequence(3, 40))
    counts = [[row.count for row in run.step().rows] for _ in range(4)]
    assert counts == [[1, 1, 1, 13], [1, 1, 1, 13], [1, 1, 1, 13], [1, 1, 1, 1]]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    run = Run(8)
    run.scheduler.add(new_sequence(0, 16))
    run.step()
    run.scheduler.add(new_sequence(1, 20))
    run.scheduler.add(new_sequence(2, 2))
    assert [row.sequence.arrival for row in run.step().rows] == [0]
    assert run.scheduler.waiting == 2


def test_where_blocks_run_out_the_latest_arrival_waits_and_keeps_its_tokens() -> None:
    run = Run(6, prefix_cache=False)
    early, late = new_sequence(0, 8), new_sequence(1, 7)
    run.scheduler.add(early)
    run.scheduler.add(late)
    preempted = [sequence for _ in range(9) for sequence in run.step().preempted]
    assert preempted == [late]
    assert late.place is Place.WAITING
    assert (len(late.table), late.computed) == (0, 0)
    assert len(late.output) > 1
    run.scheduler.finish(early)
    [row] = run.step().rows
    assert (row.start, row.count) == (0, late.length - 1)


def test_choices_share_full_blocks_and_copy_the_last() -> None:
    run = Run(16)
    leader = new_sequence(0, 10, n=3)
    first, second = leader.followers
    run.scheduler.add(leader)
    run.step()
    assert leader.table[:2] == first.table[:2] == second.table[:2]
    assert len({leader.table[2], first.table[2], second.table[2]}) == 3
    assert run.pool.used == 5


def test_a_follower_takes_over_when_its_leader_goes() -> None:
    run = Run(64)
    leader = new_sequence(0, 40, n=2)
    [heir] = leader.followers
    run.scheduler.add(leader)
    run.step()
    run.scheduler.finish(leader)
    [row] = run.step().rows
    assert (row.sequence, row.start) == (heir, 16)
    run.scheduler.finish(heir)
    assert run.pool.used == 0


arrivals = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(10, 24), st.booleans())
def test_all_end_and_nothing_leaks(requests: list[tuple[int, int, int]], num_blocks: int, prefix_cache: bool) -> None:
    run = Run(num_blocks, max_num_seqs=5, prefix_cache=prefix_cache)
    expected = 0
    for arrival, (prompt, n, pause) in enumerate(requests):
        run.scheduler.add(new_sequence(arrival, prompt, n))
        expected += n
        for _ in range(pause):
            run.step(max_tokens=12)
    for _ in range(400):
        if len(run.ended) == expected:
            break
        run.step(max_tokens=12)
    assert len(run.ended) == expected
    assert all(len(sequence.output) == 12 for sequence in run.ended)
    assert (run.pool.used, run.scheduler.running, run.scheduler.waiting) == (0, 0, 0)
