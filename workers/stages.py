"""Stages of one's own: tasks by name, as functions, on queues that only their workers read.

    stages = Stages()

    @stages.task("embed", queue="embed", soft_time_limit=5, time_limit=10)
    async def embed(task: StageTask, text: str, *, scale: float = 1.0) -> list[float]: ...

`baton worker embed --app mystages` runs all tasks of the queue `embed`. An `async def` runs in the worker's event loop and must not keep
it busy; a plain `def` runs in a thread. What it returns is the result, unless it is an outcome (`workers/outcome.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import os
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec

from pipeline.errors import BatonError, ConfigError, RetryLater, WireError
from pipeline.keys import wrong_queue
from pipeline.protocol import LLMEngineOutput, TaskCall, pack_tokens
from workers.holdings import Held, Holdings, Task
from workers.limits import TimeLimits, in_thread
from workers.outcome import Done, Outcome
from workers.steps import StepWriter
from workers.worker import Worker

Function = Callable[..., Any]
AnyFunction = TypeVar("AnyFunction", bound=Function)

FIRST_PARAMETER = "the first parameter of a task is its StageTask, the caller's arguments come behind it"


class StageTask:
    """What a function gets before its arguments: which call this is, and how it may stream."""

    def __init__(self, task: Task, held: Held, steps: StepWriter) -> None:
        assert task.request.task is not None
        self.id = task.delivery.id
        self.name = task.request.task.name
        self.attempts = task.delivery.attempts  # deliveries before this one that made no progress
        self.priority = task.delivery.lane
        self.deadline_ms = task.delivery.deadline_ms  # of the request, in ms of Redis TIME
        self.logged: list[int] = list(task.log.tokens[0])  # what earlier deliveries emitted: go on behind it
        self._held = held
        self._steps = steps

    async def emit(self, token_ids: Sequence[int]) -> None:
        """Log tokens (unsigned 32-bit numbers) and send them to who reads the request; returns when they are safe.

        A delivery after this one finds them in `logged`, and what it emits stands behind them.
        """
        added = list(token_ids)
        try:
            pack_tokens(added)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"{self.name} emits token ids that are no unsigned 32-bit numbers: {error}") from error
        if not added:
            return
        index = len(self.logged)
        self.logged += added
        self._steps.put([LLMEngineOutput(self._held.key, 0, index, added)])
        while self._held.lengths[0] < len(self.logged):  # one that is not ours any more is cancelled here
            self._held.progress.clear()
            await self._held.progress.wait()
            if self._held.complete.done():
                self._held.complete.result()  # raises why its log does not take them

    def retry(self, why: str, *, countdown: float | None = None) -> RetryLater:
        """`raise task.retry("rate limited", countdown=30)`: try again then; without a countdown later each time."""
        return RetryLater(why, countdown=countdown)


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A registered function and how it runs."""

    name: str
    queue: str
    function: Function
    limits: TimeLimits
    max_attempts: int | None

    @property
    def is_async(self) -> bool:
        """Whether it runs in the event loop; else in a thread."""
        return inspect.iscoroutinefunction(self.function)


class Stages:
    """The tasks of one app, by queue and name."""

    def __init__(self) -> None:
        self._stages: dict[str, dict[str, Stage]] = {}

    def task(
        self, name: str, *, queue: str, soft_time_limit: float | None = None, time_limit: float | None = None,
        max_attempts: int | None = None,
    ) -> Callable[[AnyFunction], AnyFunction]:  # fmt: skip
        """Register a function as the task `name` of `queue`; its first parameter gets the `StageTask`. It stays an ordinary function.

        `soft_time_limit`: seconds until `SoftTimeLimitExceeded` is raised inside (`async def` only: a thread cannot be told);
        `time_limit`: seconds until it is stopped and the request fails; `max_attempts`: instead of `worker.max_attempts`.
        """
        if wrong := wrong_queue(queue):
            raise ConfigError(f"task {name}: {wrong}")
        if name in self._stages.get(queue, {}):
            raise ConfigError(f"task {name} of queue {queue} is registered twice")
        if max_attempts is not None and max_attempts < 1:
            raise ConfigError(f"task {name}: max_attempts is {max_attempts}, at least 1 is needed")
        try:
            limits = TimeLimits(soft_time_limit, time_limit)
        except ValueError as error:
            raise ConfigError(f"task {name}: {error}") from error

        def register(function: AnyFunction) -> AnyFunction:
            _check_first_parameter(name, function)
            stage = Stage(name, queue, function, limits, max_attempts)
            if limits.soft_s is not None and not stage.is_async:
                raise ConfigError(f"task {name}: a soft time limit needs an `async def`; a thread cannot be told")
            self._stages.setdefault(queue, {})[name] = stage
            return function

        return register

    def queues(self) -> list[str]:
        """All queues that have a task."""
        return sorted(self._stages)

    def on(self, queue: str) -> list[Stage]:
        """The tasks of one queue. Raises `ConfigError` naming what there is."""
        if queue not in self._stages:
            raise ConfigError(f"no task for queue {queue!r}; the app has queues {', '.join(self.queues()) or '(none)'}")
        return list(self._stages[queue].values())


def _check_first_parameter(name: str, function: Function) -> None:
    """Raises `ConfigError` where it is known now that the function cannot take a `StageTask` first."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # noqa: BLE001  # an annotation that cannot be evaluated here says nothing
        signature = inspect.signature(function)
    first = next(iter(signature.parameters.values()), None)
    takes = first is not None and first.kind in (
        first.POSITIONAL_ONLY,
        first.POSITIONAL_OR_KEYWORD,
        first.VAR_POSITIONAL,
    )
    if first is None or not takes or not _may_be_task(first.annotation):
        raise ConfigError(f"task {name}: {name}{signature}: {FIRST_PARAMETER}")


def _may_be_task(annotation: Any) -> bool:
    """False where it is certain that a `StageTask` is not meant; what is no plain class is taken."""
    kind = typing.get_origin(annotation) or annotation
    if not isinstance(kind, type) or kind in (inspect.Parameter.empty, types.UnionType, Any):
        return True
    try:
        return issubclass(StageTask, kind)
    except TypeError:  # a protocol that cannot be checked
        return True


def load_stages(app: str) -> Stages:
    """The `Stages` of a module: `mystages` where it has one, `mystages:name` else. Raises `ConfigError`."""
    module_name, _, attribute = app.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        is_plain = isinstance(error, (BatonError, ImportError, SyntaxError))
        said = error.msg if isinstance(error, SyntaxError) else str(error) if is_plain else repr(error)
        raise ConfigError(f"--app {app}: cannot import it: {said}{_place_of(error)}") from error
    found = {name: value for name, value in vars(module).items() if isinstance(value, Stages)}
    if attribute in found:
        return found[attribute]
    if attribute or len(set(map(id, found.values()))) != 1:
        there = ", ".join(found) or "none"
        raise ConfigError(f"--app {app}: which Stages? {module_name} has {there}; say {module_name}:NAME")
    return next(iter(found.values()))


def _place_of(error: Exception) -> str:
    """Where in the user's own code it was raised, or what cannot be read there."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    foreign = ("<frozen", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(foreign)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def register(worker: Worker, tasks: Sequence[Stage], holdings: Holdings, steps: StepWriter, threads: Executor) -> None:
    """Make `worker` run these tasks of one queue."""
    for stage in tasks:
        worker.task(
            stage.name, queue=stage.queue, time_limit=stage.limits.hard_s, soft_time_limit=stage.limits.soft_s,
            max_attempts=stage.max_attempts,
        )(_handler(stage, holdings, steps, threads))  # fmt: skip


def _handler(
    stage: Stage, holdings: Holdings, steps: StepWriter, threads: Executor
) -> Callable[[Task], Coroutine[Any, Any, Outcome]]:
    signature = inspect.signature(stage.function)

    async def run(task: Task) -> Outcome:
        call, held = task.request.task, holdings.get(task.delivery.key)
        assert call is not None and held is not None
        stage_task = StageTask(task, held, steps)
        _check(stage, signature, stage_task, call)
        if stage.is_async:
            given = await stage.function(stage_task, *call.args, **call.kwargs)
        else:
            loop = asyncio.get_running_loop()
            given = await in_thread(
                loop.run_in_executor(threads, lambda: stage.function(stage_task, *call.args, **call.kwargs))
            )
        return given if isinstance(given, Outcome) else Done(result=given)

    return run


def _check(stage: Stage, signature: inspect.Signature, task: StageTask, call: TaskCall) -> None:
    """Arguments that the function cannot take are the caller's mistake: trying again cannot help."""
    try:
        signature.bind(task, *call.args, **call.kwargs)
    except TypeError as error:
        raise WireError(f"{stage.name}: {error} (it is {stage.name}{signature}; {FIRST_PARAMETER})") from error


class StageCapacity:
    """What a worker of a stage of one's own may claim: as many tasks as it runs at once. A task counts as one block."""

    def __init__(
        self, queue: str, tasks: Sequence[Stage], holdings: Holdings, concurrency: int,
        is_paused: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._tasks = tasks
        self._holdings = holdings
        self._concurrency = concurrency
        self._is_paused = is_paused

    def free_blocks(self, share: float = 1.0) -> int:
        """See `Capacity.free_blocks`. Every lane may fill it: nothing is kept when a task has ended."""
        return 0 if self._is_paused() else self._concurrency - len(self._holdings)

    def step_fill(self) -> float:
        """See `Capacity.step_fill`: what it claims runs at once."""
        return 0.0

    def total_blocks(self) -> int:
        """See `Capacity.total_blocks`."""
        return self._concurrency

    def block_size(self) -> int:
        """See `Capacity.block_size`: a call has no prompt, and takes one place."""
        return 1

    def describe(self) -> bytes:
        """What runs here, for status."""
        names = [stage.name for stage in self._tasks]
        said = {
            "stage": self._queue,
            "up": True,
            "paused": self._is_paused(),
            "total_blocks": self._concurrency,
            "concurrency": self._concurrency,
            "tasks": names,
        }
        return msgspec.json.encode(said)

    def told(self) -> dict[str, Any]:
        """The section of `stats` on what runs its tasks: this process itself (see `workers/control.py`)."""
        pool = {
            "implementation": "tasks",
            "max-concurrency": self._concurrency,
            "processes": [os.getpid()],
            "running": len(self._holdings),
        }
        return {"pool": pool}


class NoResources:
    """A stage of one's own keeps nothing that a note could free: its handler is cancelled, that is all."""

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        """See `Resources.cancel`."""

    async def release(self, handle_id: str) -> None:
        """See `Resources.release`."""
