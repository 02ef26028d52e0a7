"""What a worker writes: lines that Celery's users know on a console, fields for programs, a banner without passwords."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from pipeline.queue import Delivery
from workers.banner import banner, engine_rows
from workers.engine import EngineInfo
from workers.outcome import Done, Dropped, Fail, Handover, Outcome, Reject, Retry
from workers.reports import Reports, told

SCRIPT = """
import sys
from pipeline.config import LogSettings
from pipeline.logs import configure
from pipeline.queue import Delivery
from workers.outcome import Done, Fail
from workers.reports import Reports
import structlog
configure(LogSettings(format=sys.argv[1]), "decode-0")
reports = Reports()
delivery = Delivery("r-1", 2, "decode", "high", b"", b"", 0, 0, "", 3, log=None)
structlog.get_logger("baton.worker").info("ready", worker="decode-0", stage="decode")
reports.received(delivery)
reports.settled(delivery, Done(), 0.12345)
reports.settled(delivery, Fail("it is too long"), 0.5)
"""


def written(format: str) -> list[str]:  # noqa: A002
    result = subprocess.run([sys.executable, "-c", SCRIPT, format], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()


def test_lines_on_a_console_are_those_that_celery_writes() -> None:
    ready, received, succeeded, raised = written("console")
    assert "decode-0 ready." in ready
    assert "Task decode[r-1] received" in received
    assert re.search(r"lane=high\b", received)
    assert "Task decode[r-1] succeeded in 0.123s" in succeeded
    assert "Task decode[r-1] raised: it is too long" in raised


def test_lines_for_programs_have_a_constant_message_and_fields() -> None:
    ready, received, succeeded, raised = (json.loads(line) for line in written("json"))
    assert (ready["event"], ready["worker"]) == ("ready", "decode-0")
    assert (received["event"], received["task"], received["request_id"]) == ("task received", "decode", "r-1")
    assert (succeeded["event"], succeeded["seconds"], succeeded["epoch"]) == ("task succeeded", 0.1235, 2)
    assert (raised["event"], raised["why"], raised["level"]) == ("task raised", "it is too long", "warning")


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Done(), "task succeeded"),
        (Handover([], None, 0), "task succeeded"),
        (Retry("engine died"), "task retry"),
        (Fail("no"), "task raised"),
        (Reject("bytes"), "task rejected"),
        (Dropped("ended elsewhere"), "task revoked"),
        (Dropped("lease lost"), "task dropped"),
    ],
)
def test_each_outcome_has_its_message(outcome: Outcome, message: str) -> None:
    assert told(outcome)[0] == message


def test_totals_count_deliveries_by_task() -> None:
    reports = Reports()
    for stage in ("prefill", "decode", "decode"):
        reports.received(Delivery("r", 1, stage, "low", b"", b"", 0, 0, "", 3, log=None))  # type: ignore[arg-type]
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
