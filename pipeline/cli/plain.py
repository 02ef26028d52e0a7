"""What the command line says of a wrong value: in words of its own, not in those of the library that checks it."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

_PLAIN = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer\b.*", "expected a whole number"),
    (r"Input should be a valid number\b.*", "expected a number"),
    (r"Input should be greater than or equal to ", "expected at least "),
    (r"Input should be less than or equal to ", "expected at most "),
    (r"Input should be ", "expected "),
)


class PlainGroup(TyperGroup):
    """The root of the command line: every command is parsed inside it."""

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = plainly(error.message)
            raise


def plainly(message: str) -> str:
    """A message without the validator's words."""
    for found, instead in _PLAIN:
        message = re.sub(found, instead, message, flags=re.DOTALL)
    return message
