"""The signals that a command stops by."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any


def on_stop(call: Callable[..., None], *arguments: Any) -> None:
    """`call` at each of them, in the loop that runs. A hang-up counts unless this process was started to outlive its terminal (nohup)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, call, *arguments)
