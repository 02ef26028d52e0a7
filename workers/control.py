"""The worker's side of `pipeline/control.py`: answers questions about itself and does what it is told.

It runs in the parent process and asks the engine nothing: what it tells of the engine is what the engine said last.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import structlog

from pipeline.connection import Connection
from pipeline.control import Answer, Question
from pipeline.errors import BatonError
from pipeline.inspection import waiting_tasks
from pipeline.protocol import UNREADABLE
from pipeline.wording import counted
from workers.child import ChildEngine
from workers.holdings import Held, Holdings
from workers.worker import Worker

log = structlog.get_logger("baton.control")

Method = Callable[[dict[str, Any]], Awaitable[Any]]


class WorkerControl:
    """Answers for one worker from `run` until it is cancelled."""

    def __init__(
        self, connection: Connection, worker: Worker, holdings: Holdings, runs: Callable[[], dict[str, Any]], *,
        redis_url: str,
    ) -> None:  # fmt: skip
        self.is_paused = False  # while it lives: a worker that is started again claims
        self._connection = connection
        self._worker = worker
        self._holdings = holdings
        self._runs = runs  # the sections of `stats` on what runs its tasks
        self._redis_url = redis_url
        self._started_s = time.monotonic()
        self._methods: dict[str, Method] = {
            "ping": self._ping, "status": self._status, "active": self._active, "reserved": self._reserved,
            "stats": self._stats, "registered": self._registered, "active_queues": self._active_queues,
            "pause": self._pause, "resume": self._resume, "drain": self._drain, "shutdown": self._drain,
        }  # fmt: skip

    async def run(self) -> None:
        """Answer questions; none of them can end the worker's work."""
        keys = self._worker.queue.keys
        subscription = await self._connection.subscribe(keys.ask())
        decode = msgspec.msgpack.Decoder(Question).decode
        async for _, data in subscription.messages():
            if data is None:  # subscribed anew: whoever asked meanwhile will ask again
                continue
            try:
                question = decode(data)
            except UNREADABLE as error:
                log.error("question is not readable, left out", worker=self._worker.name, error=str(error))
                continue
            if question.to and self._worker.name not in question.to:
                continue
            answer = await self._answer(question)
            try:
                await self._connection.command("PUBLISH", keys.told(question.ticket), answer)
            except BatonError as error:
                log.warning("answer not sent", worker=self._worker.name, method=question.method, error=str(error))

    async def _answer(self, question: Question) -> bytes:
        name, encode = self._worker.name, msgspec.msgpack.encode
        method = self._methods.get(question.method)
        if method is None:
            known = ", ".join(self._methods)
            return encode(Answer(name, error=f"this worker knows no {question.method}; it knows {known}"))
        try:
            return encode(Answer(name, await method(question.arguments)))
        except Exception as error:  # the asker hears it, the worker works on
            log.exception("question failed", worker=name, method=question.method)
            return encode(Answer(name, error=f"{type(error).__name__}: {error}"))

    # -- questions ------------------------------------------------------------------------------------------------------

    async def _ping(self, _: dict[str, Any]) -> str:
        return "pong"

    async def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"ok": "pong", "state": self._state(), "stage": self._worker.stage, "held": len(self._holdings)}

    def _state(self) -> str:
        if self._worker.is_draining:
            return "draining"
        return "paused" if self.is_paused else "working"

    async def _active(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._told_of(held) for held in self._holdings.all()]

    def _told_of(self, held: Held) -> dict[str, Any]:
        delivery, call = held.task.delivery, held.task.request.task
        seconds = time.monotonic() - held.started_s
        return {
            "id": held.id, "name": call.name if call else delivery.stage, "hostname": self._worker.name,
            "epoch": held.epoch, "lane": delivery.lane,
            "time_start": round(time.time() - seconds, 3), "seconds": round(seconds, 3), "attempts": delivery.attempts,
            "prompt_tokens": delivery.prompt_tokens, "tokens": held.lengths, "worker_pid": os.getpid(),
        }  # fmt: skip

    async def _reserved(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        own = f"@{self._worker.name}"
        waiting = await waiting_tasks(self._connection, self._worker.queue.keys, self._worker.stage, own)
        return [msgspec.structs.asdict(task) for task in waiting]

    async def _registered(self, _: dict[str, Any]) -> list[str]:
        return self._worker.tasks

    async def _active_queues(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"name": self._worker.stage, "lane": lane} for lane in self._worker.lanes]

    async def _stats(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "total": dict(self._worker.reports.totals),
            "pid": os.getpid(),
            "clock": str(self._worker.reports.clock),
            "uptime": int(time.monotonic() - self._started_s),
            "state": self._state(),
            "held": len(self._holdings),  # the engine's own figures are a moment old
            "prefetch_count": 0,  # nothing is claimed that cannot start
            "broker": _broker(self._redis_url),
            **self._runs(),
            "rusage": _usage(),
        }

    # -- orders -----------------------------------------------------------------------------------------------------------

    async def _pause(self, _: dict[str, Any]) -> str:
        if not self.is_paused:
            log.info("paused: claims nothing until it is told to resume", worker=self._worker.name)
        self.is_paused = True
        self._worker.announce()
        return "paused: what it holds goes on, nothing new is claimed"

    async def _resume(self, _: dict[str, Any]) -> str:
        if self.is_paused:
            log.info("resumed", worker=self._worker.name)
        self.is_paused = False
        self._worker.announce()
        self._worker.wake()
        return "claims again"

    async def _drain(self, _: dict[str, Any]) -> str:
        self._worker.drain()
        return f"drains {counted(len(self._holdings), 'task')}, then leaves"


def engine_told(engine: ChildEngine, worker: Worker) -> dict[str, Any]:
    """The sections of `stats` on an engine and what it keeps for others."""
    stats = engine.stats()
    figures = msgspec.to_builtins(stats)
    fetched = figures.pop("fetched")
    return {
        "pool": {
            "implementation": engine.info.name,
            "model": engine.info.model,
            "max-concurrency": engine.info.max_num_seqs,
            "processes": [engine.pid],
            "heard_s_ago": round(time.monotonic() - engine.heard_s, 3),
            "num_blocks": engine.info.num_blocks,
            **figures,
        },
        "transfer": {
            "handles": worker.exported,
            "bytes_used": stats.handle_bytes,
            "bytes_free": stats.handle_bytes_free,
            "fetched": fetched,
        },
    }


def _broker(url: str) -> dict[str, Any]:
    """Where Redis is, without the password that an address may carry."""
    parts = urlsplit(url)
    return {"transport": parts.scheme, "hostname": parts.hostname or parts.path, "port": parts.port}


def _usage() -> dict[str, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    names = ("utime", "stime", "maxrss", "minflt", "majflt", "nvcsw", "nivcsw")
    return {name: getattr(usage, f"ru_{name}") for name in names}
