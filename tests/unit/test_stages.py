"""What an app of tasks may say, and how it is found."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import ConfigError
from pipeline.protocol import Request, TaskCall, no_input
from tests import example_stage
from tests.system import request
from workers.outcome import Done, Fail, packed
from workers.stages import Stages, StageTask, load_stages


def test_an_app_is_found_by_its_module() -> None:
    assert load_stages("tests.example_stage") is example_stage.stages
    assert load_stages("tests.example_stage:stages") is example_stage.stages
    assert example_stage.stages.queues() == ["words"]


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("no.such.module", "--app no.such.module: cannot import it: No module named 'no'"),
        ("tests.texts", "which Stages\\? tests.texts has none; say tests.texts:NAME"),
        ("tests.example_stage:other", "which Stages\\? tests.example_stage has stages; say"),
        ("two_apps", "which Stages\\? two_apps has a, b; say two_apps:NAME"),
    ],
)
def test_an_app_that_is_not_there_is_said(app: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = types.ModuleType("two_apps")
    vars(two).update(a=Stages(), b=Stages())
    monkeypatch.setitem(sys.modules, "two_apps", two)
    with pytest.raises(ConfigError, match=message):
        load_stages(app)


@pytest.mark.parametrize(
    ("queue", "options", "message"),
    [
        ("decode", {}, "task t: 'decode' cannot be a queue of one's own"),
        ("pool", {}, "'pool' cannot be"),
        (
            "a b",
            {},
            "'a b' cannot be a queue of one's own: its name is 1 to 64 letters, .*, and is none of prefill, decode, api, pool",
        ),
        ("q", {"time_limit": 1, "soft_time_limit": 2}, "task t: the soft time limit \\(2 s\\) must come before"),
        ("q", {"max_attempts": 0}, "max_attempts is 0"),
        ("q", {"soft_time_limit": 2}, "a soft time limit needs an `async def`"),
    ],
)
def test_a_task_that_cannot_be_is_refused(queue: str, options: dict[str, int], message: str) -> None:
    def function(task: object) -> None: ...

    with pytest.raises(ConfigError, match=message):
        Stages().task("t", queue=queue, **options)(function)


def no_parameter() -> None: ...
def celery_style(a: int, b: int) -> int: ...
def of_a_list(a: list[str]) -> int: ...
def only_keywords(*, task: StageTask) -> None: ...


@pytest.mark.parametrize("function", [no_parameter, celery_style, of_a_list, only_keywords])
def test_a_function_that_cannot_take_the_task_first_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(
        ConfigError, match=r"task t: t\(.*\).*: the first parameter of a task is its StageTask, the caller"
    ):
        Stages().task("t", queue="q")(function)


def annotated(task: StageTask, a: int) -> None: ...
def with_more(task: StageTask | None, a: int) -> None: ...
def of_anything(task: object) -> None: ...
def not_annotated(task, a) -> None: ...  # type: ignore[no-untyped-def]
def not_known_here(task: Elsewhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def with_any(*args: Any) -> None: ...


@pytest.mark.parametrize("function", [annotated, with_more, of_anything, not_annotated, not_known_here, with_any])
def test_a_function_that_may_take_it_is_registered(function: Callable[..., object]) -> None:
    stages = Stages()
    assert stages.task("t", queue="q")(function) is function
    assert [stage.name for stage in stages.on("q")] == ["t"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef broken(:\n", r"invalid syntax \({file}, line 2\)"),
        ("\n\nraise ValueError('not today')\n", r"ValueError\('not today'\) \({file}, line 3\)"),
        ("import json\njson.loads('x')\n", r"JSONDecodeError\(.*\) \({file}, line 2\)"),
        ("import no_such_thing\n", r"No module named 'no_such_thing' \({file}, line 1\)"),
        (
            "from workers.stages import Stages\nstages = Stages()\n@stages.task('t', queue='q')\ndef f(a: int): ...\n",
            r"task t: t\(a: int\): the first parameter of a task is its StageTask, .* \({file}, line \d\)",
        ),
    ],
)
def test_an_app_that_cannot_be_imported_says_where(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"app_{abs(hash(text))}"
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"--app {name}: cannot import it: {said.format(file=re.escape(str(file)))}$"):
        load_stages(name)


def test_a_name_stands_once_in_a_queue() -> None:
    stages = Stages()
    stages.task("t", queue="q")(lambda task: None)
    stages.task("t", queue="other")(lambda task: None)
    with pytest.raises(ConfigError, match="task t of queue q is registered twice"):
        stages.task("t", queue="q")
    with pytest.raises(ConfigError, match="no task for queue 'x'; the app has queues other, q"):
        stages.on("x")


def test_a_result_is_packed_or_fails_its_request() -> None:
    assert packed(Done(), 10) == Done()
    assert packed(Done([1, 2]), 10) == Done(b"\x92\x01\x02")
    assert packed(Fail("x"), 10) == Fail("x")
    assert packed(Done("x" * 20), 10) == Fail("its result has 21 bytes, more than queue.max_result_bytes (10)")
    assert isinstance(packed(Done({1: object()}), 10), Fail)


def test_workers_that_know_no_tasks_read_every_other_request() -> None:
    """The field is left out where it is not set: structs refuse unknown ones."""
    assert b"task" not in msgspec.msgpack.encode(request(3))
    item = no_input("p-1", "p")
    call = Request(id="p-1", kind="task", created_s=0, input=item, task=TaskCall(name="embed", args=["a", 1]))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(call), type=Request) == call
