"""Futures whose waiter may have gone: what comes too late is dropped."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


def give(future: asyncio.Future[T], value: T) -> bool:
    """Set the result; whether there was still somebody to take it."""
    if future.done():
        return False
    future.set_result(value)
    return True


def fail(future: asyncio.Future[T], error: BaseException) -> None:
    """Set the error, if anybody still waits."""
    if not future.done():
        future.set_exception(error)
