"""Baton with vLLM workers on two GPUs: a private Redis, an API, and two decode workers or a prefill and a decode worker."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import spread
from benchmarks.gpu.fleet import Fleet, free_port
from benchmarks.gpu.http import is_ready
from benchmarks.gpu.load import MODEL, Seen, Target
from benchmarks.gpu.options import environment, extra_engine_arguments, shape_of
from benchmarks.gpu.plain import KV_BYTES_ON_CPU
from pipeline.config import RedisSettings
from pipeline.connection import Connection
from pipeline.control import ControlClient
from pipeline.inspection import task_state
from pipeline.keys import PoolKeys
from pipeline.protocol import Timeline
from pipeline.redis_server import RedisServer
from pipeline.snapshot import set_router

STAGES = {  # from one stamp of a request's timeline to another
    "queued_prefill_ms": ("admitted", "claimed_prefill"),
    "prefill_ms": ("claimed_prefill", "handover"),  # computing and exporting
    "queued_decode_ms": ("handover", "claimed_decode"),
    "fetch_ms": ("claimed_decode", "fetched"),  # of a hand-over; computing, where decode prefills
    "life_ms": ("admitted", "ended"),
}
SETTLE_S = 1.0  # a worker tells what its engine said last, some times a second
COUNTED = ("prompt_tokens_computed", "recomputed_tokens", "output_tokens", "preemptions")

Fetched = dict[str, dict[str, float]]


class BatonSystem:
    """`stages`: of the worker on the first and on the second GPU."""

    def __init__(self, arguments: argparse.Namespace, fleet: Fleet, model: Path, *, stages: tuple[str, str]) -> None:
        self._arguments = arguments
        self._fleet = fleet
        self._model = model
        self._stages = stages
        self._keys = PoolKeys(MODEL)
        self._stack = ExitStack()
        self._before: dict[str, Any] = {}
        self.target = Target((free_port(),))

    async def __aenter__(self) -> BatonSystem:
        redis = self._start_redis()
        self.connection = Connection(RedisSettings(url=redis.url))
        config = self._fleet.logs / "config.toml"
        config.write_text(f'[pools.{MODEL}]\nengine = "vllm"\n')  # with --set alone the built-in model is served, too
        sets = ["--config", str(config)]
        sets += [word for setting in self._settings(redis.url) for word in ("--set", setting)]
        for place, stage in enumerate(self._stages):
            tokens = getattr(self._arguments, "decode_batched_tokens", 0) if self._is_second_of_pair(place) else 0
            steps = ["--set", f"engine.vllm.max_num_batched_tokens={tokens}"] if tokens else []
            words = [stage, "--name", f"{stage}-{place}", *sets, *steps]
            self._fleet.spawn(f"{stage}-{place}", "workers", words, environment(self._arguments, place))
        (port,) = self.target.ports
        self._fleet.spawn("api", "api", [*sets, "--set", f"api.port={port}"], {"HF_HUB_OFFLINE": "1"})
        try:
            await self._fleet.until(self._is_up, self._arguments.start_s, "API and workers were ready")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()
        self._stack.close()

    def _is_second_of_pair(self, place: int) -> bool:
        return "prefill" in self._stages and self._stages[place] == "decode"

    def _start_redis(self) -> RedisServer:
        if self._arguments.redis_server:
            folder = Path(self._arguments.redis_server).absolute().parent
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp")))
        server = self._stack.enter_context(RedisServer.start(folder))
        server.wait_ready()
        return server

    def _settings(self, url: str) -> list[str]:
        asked, pool = self._arguments, f"pools.{MODEL}"
        is_cpu = asked.device == "cpu"
        arena = int(asked.arena_gib * 2**30)
        found = {
            "redis.url": url,
            f"{pool}.model": self._model,
            f"{pool}.tokenizer": "none",
            "engine.vllm.dtype": shape_of(asked).dtype,
            "engine.vllm.max_num_seqs": asked.num_seqs,
            "engine.vllm.max_num_batched_tokens": asked.batched_tokens,
            "engine.vllm.gpu_memory_utilization": asked.gpu_memory,
            "engine.vllm.block_size": asked.block_size,
            "engine.vllm.enforce_eager": str(is_cpu).lower(),
            "engine.vllm.kv_cache_bytes": KV_BYTES_ON_CPU if is_cpu else 0,
            "engine.vllm.args": json.dumps(extra_engine_arguments(asked)),
            "transfer.kind": getattr(asked, "transfer", "auto"),
            "transfer.arena_bytes": arena,
            "transfer.tcp.staging_bytes": arena,
            "worker.stall_s": 120,
            "log.level": "warning",
        }
        return [f"{key}={value}" for key, value in found.items()] + asked.overrides

    async def _is_up(self) -> bool:
        if not await is_ready(*self.target.ports):
            return False
        alive = [await self.connection.command("ZCARD", self._keys.alive(stage)) for stage in set(self._stages)]
        return sum(alive) == len(self._stages)

    async def set_max_local(self, tokens: int) -> None:
        """From now on prompts of at most so many tokens are prefilled by the decode worker."""
        await set_router(self.connection, self._keys, {"max_local_prefill_length": tokens})

    # -- what Baton says of a rate --------------------------------------------------------------------------------------------

    async def before(self) -> None:
        """Remember the counters."""
        self._before = await self._counters()

    async def after(self, seen: Sequence[Seen]) -> dict[str, Any]:
        """What the workers counted since `before`, and where the requests' time went by Redis's stamps."""
        now = await self._counters()
        fetched = fetched_since(self._before["fetched"], now["fetched"])
        engines = {
            worker: {name: counted[name] - self._before["engines"][worker][name] for name in COUNTED}
            for worker, counted in now["engines"].items()
            if worker in self._before["engines"]
        }
        stages = {kind: await self.stages(s for s in seen if s.kind == kind) for kind in {s.kind for s in seen}}
        recomputed = {
            name: count - self._before["recomputed"].get(name, 0) for name, count in now["recomputed"].items()
        }
        return {"fetched": fetched, "engines": engines, "stages": stages, "recomputed": recomputed}

    async def stages(self, seen: Any) -> dict[str, Any]:
        """Stage times of requests."""
        timelines = [await self.timeline(one.request_id) for one in seen if one.request_id]
        found = {}
        for name, (begin, end) in STAGES.items():
            spans = [(getattr(t, begin), getattr(t, end)) for t in timelines if t is not None]
            found[name] = spread([(b - a) / 1e3 for a, b in spans if a and b])
        return {name: values for name, values in found.items() if values}

    async def timeline(self, request_id: str) -> Timeline | None:
        """When what happened to a request, in microseconds of Redis's clock."""
        state = await task_state(self.connection, request_id)
        return state.timeline if state else None

    async def _counters(self) -> dict[str, Any]:
        await asyncio.sleep(SETTLE_S)
        replies = await ControlClient(self.connection, MODEL).ask("stats", timeout_s=5.0)
        fetched: Fetched = {}
        engines = {}
        for worker, answer in replies.answers.items():
            if not answer.value:
                continue
            engines[worker] = answer.value["pool"]
            for way, counted in answer.value["transfer"]["fetched"].items():
                total = fetched.setdefault(way, dict.fromkeys(counted, 0))
                fetched[way] = {name: total[name] + value for name, value in counted.items()}
        pairs = await self.connection.command("HGETALL", self._keys.counters())
        counters = dict(zip(pairs[0::2], pairs[1::2], strict=True)) if isinstance(pairs, list) else pairs
        recomputed = {key.decode(): int(value) for key, value in counters.items() if b"recomputed" in key}
        return {"fetched": fetched, "engines": engines, "recomputed": recomputed}


def fetched_since(before: Fetched, now: Fetched) -> dict[str, dict[str, float]]:
    """By way: hand-overs, bytes, and what a fetch took; fetches overlap, so `gb_per_s` is that of one of them."""
    found = {}
    for way, counted in now.items():
        delta = {name: value - before.get(way, {}).get(name, 0) for name, value in counted.items()}
        if delta["handles"] and delta["seconds"]:
            found[way] = {
                "handles": delta["handles"],
                "nbytes": delta["nbytes"],
                "ms_a_fetch": round(1e3 * delta["seconds"] / delta["handles"], 3),
                "gb_per_s": round(delta["nbytes"] / delta["seconds"] / 1e9, 3),
            }
    return found
