"""What `/metrics` tells: this process's requests, and the pools as Redis knows them. One registry an app, none of the library's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.protocol import Timeline
from pipeline.queue import STAGES as SCALED
from pipeline.scaling.figures import known
from pipeline.scaling.watch import Look
from pipeline.snapshot import PoolSnapshot
from pipeline.stream import Ended

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# Each stage of a request's life, from one stamp of its timeline to the next.
STAGES = (
    ("queue_prefill", "admitted", "claimed_prefill"),
    ("prefill", "claimed_prefill", "handover"),
    ("queue_decode", "handover", "claimed_decode"),
    ("transfer", "claimed_decode", "fetched"),
    ("decode", "claimed_decode", "ended"),
)

# Names, texts and labels of what a look at a pool says beyond its counters.
OF_SCALING = {
    "running": ("baton_running", "What runs: prompts in prefill, choices in decode", []),
    "blocks_used": ("baton_blocks_used", "Blocks in use, of the workers that claim", []),
    "blocks_total": ("baton_blocks", "Blocks of the workers that claim", []),
    "served_per_s": ("baton_served_tasks_per_second", "Tasks handed out", []),
    "predicted_wait_s": ("baton_predicted_wait_seconds", "How long a task that comes now waits", []),
    "oldest_s": ("baton_oldest_waiting_seconds", "Age of the task that waits longest", ["lane"]),
    "arrivals_per_s": ("baton_arrivals_per_second", "Requests that begin in the stage", ["lane"]),
    "prompt_tokens_per_s": ("baton_arriving_prompt_tokens_per_second", "Prompt tokens of these", ["lane"]),
}

KV_LOST_REASONS = ("gone", "generation", "layout", "digest")


class Metrics:
    """The numbers of one API process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "baton_requests", "Requests that ended here, by how", ["pool", "kind", "state"], registry=self.registry
        )
        self._refused = Counter("baton_refusals", "Requests answered with an error", ["code"], registry=self.registry)
        self._tokens = Counter("baton_tokens", "Tokens of ended requests", ["pool", "part"], registry=self.registry)
        self.live = Gauge("baton_live_requests", "Requests being answered", ["pool"], registry=self.registry)
        self._first_token = Histogram(
            "baton_first_token_seconds",
            "From the request's body to its first token",
            ["pool"],
            buckets=SHORT_S,
            registry=self.registry,
        )
        self._whole = Histogram(
            "baton_request_seconds",
            "From the request's body to its end",
            ["pool"],
            buckets=SHORT_S,
            registry=self.registry,
        )
        self._stages = Histogram(
            "baton_stage_seconds",
            "Time in each stage, by Redis's clock",
            ["pool", "stage"],
            buckets=SHORT_S,
            registry=self.registry,
        )
        self._pools = _Pools()
        self.registry.register(self._pools)

    def refused(self, code: str) -> None:
        """An error was the answer."""
        self._refused.labels(code).inc()

    def first_token(self, pool: str, seconds: float) -> None:
        """The first token of a request came."""
        self._first_token.labels(pool).observe(seconds)

    def ended(self, pool: str, kind: str, state: str, seconds: float, ended: Ended | None) -> None:
        """A request that was admitted is over; `ended` is None when this process left it before its end was known."""
        self._requests.labels(pool, kind, state).inc()
        self._whole.labels(pool).observe(seconds)
        if ended is not None:
            self._tokens.labels(pool, "prompt").inc(ended.usage.prompt_tokens)
            self._tokens.labels(pool, "cached").inc(ended.usage.cached_tokens)
            self._tokens.labels(pool, "completion").inc(ended.usage.completion_tokens)
            for stage, seconds_there in stage_seconds(ended.timeline):
                self._stages.labels(pool, stage).observe(seconds_there)

    def render(self, snapshots: Mapping[str, PoolSnapshot], looks: Mapping[str, Look]) -> bytes:
        """Everything as Prometheus reads it."""
        self._pools.snapshots, self._pools.looks = snapshots, looks
        return generate_latest(self.registry)


def stage_seconds(timeline: Timeline) -> list[tuple[str, float]]:
    """How long each stage took that the request went through."""
    stages = []
    for stage, begin, end in STAGES:
        begin_us, end_us = getattr(timeline, begin), getattr(timeline, end)
        if begin_us and end_us >= begin_us:
            stages.append((stage, (end_us - begin_us) / 1e6))
    return stages


class _Pools(Collector):
    """The pools' counters, as last read."""

    def __init__(self) -> None:
        self.snapshots: Mapping[str, PoolSnapshot] = {}
        self.looks: Mapping[str, Look] = {}

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("baton_workers", "Living processes", labels=["pool", "role"])
        for pool, snapshot in self.snapshots.items():
            for role, names in snapshot.workers.items():
                workers.add_metric([pool, role], len(names))
        yield workers
        yield from self._by_lane("baton_waiting_tasks", "Tasks that wait", "waiting")
        yield from self._by_lane("baton_waiting_prompt_tokens", "Prompt tokens that wait", "tokens")
        yield self._totals("baton_claims", "Tasks handed out", "claimed:", ["stage", "lane"])
        yield self._totals("baton_ended_requests", "Requests that ended in this pool", "ended:", ["state"])
        yield self._recomputed()
        yield self._totals("baton_admitted_requests", "Requests admitted", "admitted", [])
        yield self._totals("baton_handovers", "Prefills handed to decode", "handovers", [])
        yield from self._of_scaling()

    def _of_scaling(self) -> Iterator[Metric]:
        """What workers are asked for by, and how many; what is not known is not there."""
        desired = GaugeMetricFamily("baton_desired_workers", "Workers that there should be", labels=["pool", "stage"])
        families = {
            name: GaugeMetricFamily(metric, text, labels=["pool", "stage", *labels])
            for name, (metric, text, labels) in OF_SCALING.items()
        }
        for pool, look in self.looks.items():
            for stage in SCALED:
                if (count := look.decision.stage(stage).desired) is not None:
                    desired.add_metric([pool, stage], count)
            for stage, lane, name, value in known(look.signals):
                if name in families:
                    families[name].add_metric([pool, stage, lane] if lane else [pool, stage], value)
        yield desired
        yield from families.values()

    def _recomputed(self) -> Metric:
        """With a zero for each reason: it is a statement that nothing was recomputed."""
        family = CounterMetricFamily(
            "baton_kv_recomputed", "Handles whose blocks were lost and computed again", labels=["pool", "reason"]
        )
        counted = {(pool, labels[0]): value for pool, labels, value in self._counters("kv_recomputed:", 1)}
        nothing = {(pool, reason): 0 for pool in self.snapshots for reason in KV_LOST_REASONS}
        for (pool, reason), value in (nothing | counted).items():
            family.add_metric([pool, reason], value)
        return family

    def _by_lane(self, name: str, text: str, prefix: str) -> Iterator[Metric]:
        family = GaugeMetricFamily(name, text, labels=["pool", "stage", "lane"])
        for pool, labels, value in self._counters(f"{prefix}:", 2):
            family.add_metric([pool, *labels], value)
        yield family

    def _totals(self, name: str, text: str, prefix: str, labels: list[str]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["pool", *labels])
        rows = [([pool, *parts], value) for pool, parts, value in self._counters(prefix, len(labels))]
        for parts, value in rows:
            family.add_metric(parts, value)
        return family

    def _counters(self, prefix: str, parts: int) -> Iterator[tuple[str, list[str], int]]:
        for pool, snapshot in self.snapshots.items():
            for name, value in snapshot.counters.items():
                rest = name.removeprefix(prefix)
                labels = rest.split(":", parts - 1) if parts and name.startswith(prefix) else []
                if len(labels) == parts and (parts or name == prefix):
                    yield pool, labels, value
