"""What a worker writes: lines that Celery's users know on a console, fields for programs, a banner without passwords."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from pipeline.queue import Brief, Delivery
from workers.banner import banner, engine_rows
from workers.engine import EngineInfo
from workers.outcome import Answer, Done, Fail, Handover, Outcome, Reject, Retry
from workers.reports import Reports, Told, lost, told

SCRIPT = """
import sys
from pipeline.config import LogSettings
from pipeline.logs import configure
from pipeline.queue import Delivery
from workers.outcome import Answer, Done, Fail, Retry
from workers.reports import Reports, told
import structlog
configure(LogSettings(format=sys.argv[1]), "decode-0")
reports = Reports()
delivery = Delivery("r-1", 2, "decode", "high", b"", b"", 0, 0, "", 3, log=None)
structlog.get_logger("baton.worker").info("ready", worker="decode-0", stage="decode")
reports.received(delivery, "decode")
reports.settled(delivery, "decode", told(Done(), Answer.TAKEN, 0), 0.12345)
reports.settled(delivery, "decode", told(Fail("it is too long"), Answer.TAKEN, 0), 0.5)
reports.settled(delivery, "embed", told(Retry("KeyError: 'x'"), Answer.DEAD, 2), 0.5)
"""


def written(format: str) -> list[str]:  # noqa: A002
    result = subprocess.run([sys.executable, "-c", SCRIPT, format], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()


def test_lines_on_a_console_are_those_that_celery_writes() -> None:
    ready, received, succeeded, raised, dead = written("console")
    assert "decode-0 ready." in ready
    assert "Task decode[r-1] received" in received
    assert re.search(r"lane=high\b", received)
    assert "Task decode[r-1] succeeded in 0.123s" in succeeded
    assert "Task decode[r-1] raised: it is too long" in raised
    assert "error" in dead
    assert "Task embed[r-1] dead-lettered after 3 attempts: KeyError: 'x'; `baton dead show r-1`" in dead


def test_lines_for_programs_have_a_constant_message_and_fields() -> None:
    ready, received, succeeded, raised, dead = (json.loads(line) for line in written("json"))
    assert (ready["event"], ready["worker"]) == ("ready", "decode-0")
    assert (received["event"], received["task"], received["request_id"]) == ("task received", "decode", "r-1")
    assert (succeeded["event"], succeeded["seconds"], succeeded["epoch"]) == ("task succeeded", 0.1235, 2)
    assert (raised["event"], raised["why"], raised["level"]) == ("task raised", "it is too long", "warning")
    assert (dead["event"], dead["task"], dead["attempts"]) == ("task dead-lettered", "embed", 3)
    assert (dead["why"], dead["then"], dead["level"]) == ("KeyError: 'x'", "`baton dead show r-1`", "error")


@pytest.mark.parametrize(
    ("outcome", "answer", "message", "level", "attempts"),
    [
        (Done(), Answer.TAKEN, "task succeeded", "info", 0),
        (Handover([], None, 0), Answer.TAKEN, "task succeeded", "info", 0),
        (Retry("engine died"), Answer.TAKEN, "task retry", "warning", 0),
        (Retry("engine died"), Answer.DEAD, "task dead-lettered", "error", 3),
        (Fail("no"), Answer.TAKEN, "task raised", "warning", 0),
        (Reject("bytes"), Answer.DEAD, "task rejected", "error", 3),
    ],
)
def test_each_outcome_has_its_message(
    outcome: Outcome, answer: Answer, message: str, level: str, attempts: int
) -> None:
    line = told(outcome, answer, attempts=2)
    assert (line.message, line.level, line.attempts) == (message, level, attempts)


@pytest.mark.parametrize(
    ("state", "reason", "message", "why"),
    [
        ("cancelled", "revoked", "task revoked", ""),
        ("cancelled", "client disconnected", "task cancelled", "client disconnected"),
        ("expired", "deadline passed in embed", "task expired", "deadline passed in embed"),
        ("done", "", "task dropped", "lease lost, finished by another worker"),
        ("dead", "KeyError", "task dropped", "ended elsewhere as dead: KeyError"),
        ("running", "", "task dropped", "fenced: it waits or runs elsewhere"),
        (None, "", "task dropped", "its record has expired"),
    ],
)
def test_what_is_not_ours_is_told_by_what_became_of_it(state: str | None, reason: str, message: str, why: str) -> None:
    brief = Brief(state, reason, "embed", 1, False, b"") if state else None
    assert lost("fenced", brief) == Told(message, why)


def test_totals_count_deliveries_by_task() -> None:
    reports = Reports()
    for stage in ("prefill", "decode", "decode"):
        reports.received(Delivery("r", 1, stage, "low", b"", b"", 0, 0, "", 3, log=None), stage)  # type: ignore[arg-type]
    assert dict(reports.totals) == {"prefill": 1, "decode": 2}


def test_the_banner_names_what_the_worker_is_and_no_password() -> None:
    engine = EngineInfo(
        name="mock", model="baton-tiny", layout="x", block_size=16, num_blocks=64, block_nbytes=8, max_model_len=100,
        max_num_seqs=8, max_num_batched_tokens=32,
    )  # fmt: skip
    text = banner(
        "decode-0", "baton-tiny", "decode", redis_url="redis://me:secret@host:6379/0", rows=engine_rows(engine, "shm"),
        lanes=["@decode-0", "high"], tasks=["decode"], version="9.9",
    )  # fmt: skip
    assert "decode-0 (baton 9.9)" in text
    assert "transport:   redis://me:***@host:6379/0" in text
    assert "secret" not in text
    assert "mock (baton-tiny, 64 blocks of 16 tokens)" in text
    assert ".> decode:@decode-0\n.> decode:high\n" in text
    assert "[tasks]\n  . decode" in text
