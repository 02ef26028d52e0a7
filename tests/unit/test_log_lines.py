"""Lines of the log hold what clients sent, and stay lines of text."""

from __future__ import annotations

import subprocess
import sys

import pytest

SENT = ["/v1/\x1b[2J\x00\x9b31m", "/v1/\r\n\x1b[2Jforged line"]
PROGRAM = """
import structlog
from pipeline.config import LogSettings
from pipeline.logs import configure
configure(LogSettings(format=FORMAT), "api")
structlog.get_logger("baton.api").info("request refused", path=SENT, status=404)
"""


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("sent", SENT)
def test_control_characters_of_a_client_are_written_as_such(form: str, sent: str) -> None:
    program = PROGRAM.replace("FORMAT", repr(form)).replace("SENT", repr(sent))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.isprintable()
    assert "request refused" in line and "/v1/" in line
