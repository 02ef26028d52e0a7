"""Celery's shapes: answers of workers, events, and what a command line refuses."""

from __future__ import annotations

import json

import msgspec
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import make_app
from pipeline.cli.events import as_json as event_json
from pipeline.cli.events import as_line
from pipeline.cli.remote import Whom, missing_lines
from pipeline.cli.replies import as_json, as_text, online, status_line
from pipeline.control import Answer, Question
from pipeline.errors import ConfigError
from pipeline.events import Event

TASK = Event("task-retried", "p-1", "decode", "low", "decode-1", 1_700_000_000_123_456, "engine died")
WORKER = Event("worker-online", "", "decode", "", "decode-1", 1_700_000_000_000_000)


def test_answers_in_celery_s_shape() -> None:
    answers = {
        "w1": Answer("w1", "pong"),
        "w2": Answer("w2", []),
        "w3": Answer("w3", ["decode", {"id": "x"}]),
        "w4": Answer("w4", {"pid": 7}),
        "w5": Answer("w5", error="knows no dance"),
    }
    assert as_text(answers).splitlines() == [
        "->  w1: OK",
        "        pong",
        "->  w2: OK",
        "    - empty -",
        "->  w3: OK",
        "    * decode",
        '    * {"id": "x"}',
        "->  w4: OK",
        "    {",
        '        "pid": 7',
        "    }",
        "->  w5: ERROR",
        "        knows no dance",
    ]
    assert json.loads(as_json(answers)) == {
        "w1": {"ok": "pong"},
        "w2": [],
        "w3": ["decode", {"id": "x"}],
        "w4": {"pid": 7},
        "w5": {"error": "knows no dance"},
    }


@pytest.mark.parametrize(("count", "line"), [(1, "1 node online."), (3, "3 nodes online.")])
def test_the_count_of_nodes(count: int, line: str) -> None:
    assert online(count) == line


def test_a_status_says_what_is_unusual() -> None:
    assert status_line("w1", Answer("w1", {"ok": "pong", "state": "working"})) == "->  w1: OK"
    assert status_line("w1", Answer("w1", {"ok": "pong", "state": "paused"})) == "->  w1: OK, paused"


def test_events_as_celery_dumps_them() -> None:
    assert as_line(TASK) == (
        "decode-1 [2023-11-14 22:13:20.123456+00:00] task retried: decode(p-1) lane=low engine died"
    )
    assert as_line(WORKER) == "decode-1 [2023-11-14 22:13:20+00:00] started: stage=decode"
    assert json.loads(event_json("p", TASK))["time_us"] == 1_700_000_000_123_456


def test_questions_and_events_of_later_versions_can_be_read() -> None:
    later = msgspec.msgpack.encode(["ask.v1", "ticket", "ping", [], {}, "something new"])
    assert msgspec.msgpack.decode(later, type=Question) == Question("ticket", "ping")
    more = msgspec.msgpack.encode(["task-paused", "p-1", "decode", "low", "w", 1, "", 9])
    assert msgspec.msgpack.decode(more, type=Event).type == "task-paused"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["control", "revoke"], "revoke: which request"),
        (["inspect", "ping", "p-1"], "ping takes no ids: p-1"),
        (["inspect", "query_task"], "query_task: which request"),
        (["dead", "replay"], "give ids of `baton dead list`, or --all"),
        (["dead", "drop", "--all", "x"], "give ids of `baton dead list`, or --all"),
        (["purge", "--lane", "slow", "-f"], "--lane: expected high, default, low or @worker, not slow"),
        (["status", "--pool", "baton-tin"], "unknown pool baton-tin; did you mean baton-tiny?"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    result = CliRunner().invoke(make_app(), words)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("to", "answered", "silent", "lines"),
    [
        ([], ["a"], [], []),
        ([], [], ["b"], ["no reply within 1 s from: b"]),
        (["a@p", "a"], ["a"], [], []),
        (["a", "b"], ["a@p", "b@q"], [], []),
        (["a@q"], ["a@p"], [], ["Error: a@q: no worker of this name is registered; registered: a, b"]),
        (["a", "b"], ["a"], ["b"], ["Error: b: no reply within 1 s"]),
    ],
)
def test_who_was_named_and_gave_no_answer_is_told(
    to: list[str], answered: list[str], silent: list[str], lines: list[str]
) -> None:
    assert missing_lines(Whom(None, to, 1.0), answered, silent, ["a", "b"]) == lines
