"""The rule on traffic of all shapes, in short: `make autoscale-traces` runs what is told in `pipeline/scaling/README.md`."""

from __future__ import annotations

import pytest

from tests.scaling.compare import POLICY
from tests.scaling.properties import all_violations
from tests.scaling.rules import Baton, Fixed
from tests.scaling.simulator import Machines, Simulation
from tests.scaling.traces import SHAPES, make

SEEDS = 60


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_bounds_hold_turns_are_rare_more_queue_never_asks_for_fewer_and_what_is_absurd_holds(first):
    assert all_violations(range(first, first + 10)) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_of_a_trace_is_answered_and_every_worker_paid(shape):
    machines, trace = Machines(), make(shape, 1, 600)
    for rule in (Baton(POLICY), Fixed(trace, machines)):
        simulation = Simulation(trace, rule, machines)
        outcome = simulation.run()
        assert outcome.requests == len(trace.arrivals)
        assert not simulation.waiting["prefill"]
        assert not simulation.waiting["decode"]
        assert outcome.in_slo <= outcome.requests - max(outcome.late_ttft, outcome.late_itl)
    assert outcome.worker_s >= sum(rule.initial) * trace.length_s


def test_a_seed_gives_the_same_run_again():
    runs = [Simulation(make("burst", 3, 600), Baton(POLICY), Machines()).run() for _ in range(2)]
    assert runs[0] == runs[1]


def test_fixed_workers_for_the_peak_keep_the_promises():
    trace, machines = make("steady", 1, 600), Machines()
    outcome = Simulation(trace, Fixed(trace, machines), machines).run()
    assert outcome.in_slo > 0.98 * outcome.requests
