"""How a command that runs until it is told to stop ends: in order, at the second signal at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine

from pipeline.errors import BatonError
from pipeline.exits import Exit, exit_for


async def until_stopped(
    work: Coroutine[object, object, None], drain: Callable[[], Awaitable[None]], kill: Callable[[], None],
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Runs `work` until it ends, fails with a BatonError, which is said, or the first signal cancels it; then `drain`, which no signal
    cancels: the second one calls `kill`. Returns the exit code."""
    working = asyncio.ensure_future(work)
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            working.cancel()
        else:
            kill()

    _listen(on_signal)
    try:
        await working
    except asyncio.CancelledError:
        pass  # by a signal
    except BatonError as error:
        say(str(error))
        return exit_for(error)
    finally:
        await drain()
    return Exit.OK if signals <= 1 else Exit.INTERRUPTED


def _listen(call: Callable[[], None]) -> None:
    """A hang-up counts unless this process was started to outlive its terminal (nohup)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, call)
