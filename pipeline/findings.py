"""What a look at something found: how bad it is, in words, with what to do about it."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Grade(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Finding(NamedTuple):
    """One thing that was looked at. `fix` says what to do and is empty when all is well."""

    check: str
    grade: Grade
    text: str
    fix: str = ""
