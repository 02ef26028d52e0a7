"""What somebody who can write to Redis would want to be run. That it was imported, or called, is to be seen by a file."""

from __future__ import annotations

import os
from pathlib import Path


def call(*_: object) -> None:
    """Leaves a trace."""
    Path(os.environ["INJECTED"]).touch()


if "INJECTED" in os.environ:  # in a worker; the tests import it without
    call()
